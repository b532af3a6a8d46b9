"""What it costs to average every step, as ratios measured in one process: `python benchmarks/steps.py [rounds]`

A collection is all that SWA does in an iteration that ends a cycle: look ahead, check that the weights are finite, list
the BatchNorm layers, update the mean. Rounds, clock and medians as in `cost.py`. Not a test: nothing is asserted,
numbers within 10% of each other are ties on a shared machine."""
import random, sys, warnings
from pathlib import Path
from statistics import median
from time import thread_time

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent/'tests')]    # this checkout, and the learners of its tests
from torchvision.models import resnet18
from common import *
from fastswa.average import WeightAverage, all_finite
from fastswa.batchnorm import bn_layers
from fastswa.callback import SWA

MANY = 10**6   # iterations in the fits that are begun: more than are ever timed

def clock(f, reps):
    "Seconds that a call of `f` takes, of `reps` that are timed together"
    t = thread_time()
    for _ in range(reps): f()
    return (thread_time()-t)/reps

def times(rounds, reps, **fs):
    "Seconds of each contender in each round, the contenders of a round in a random order"
    for f in fs.values(): f()
    res = {k:[] for k in fs}
    for _ in range(rounds):
        for k in random.sample(list(fs), len(fs)): res[k].append(clock(fs[k], reps[k]))
    return res

def times_of(res, k, base): return median(a/b for a,b in zip(res[k], res[base]))

class Same:
    "One batch, `MANY` times"
    def __init__(self, *batch): self.batch = batch
    def __len__(self): return MANY
    def __getitem__(self, i): return self.batch

class Enough(Exception): pass

class Middle(Callback):
    "Calls `do` at the end of the first iteration, and leaves the fit without what comes at its end"
    order = 1000
    def __init__(self, do): self.do = do
    def after_batch(self):
        self.do()
        raise Enough('all is measured')      # fastai reads an error's first argument

def in_a_fit(model, x, y, swa, do):
    "Call `do(iteration)` in the middle of a fit; `iteration` is what `swa` does in one of its iterations"
    data = DataLoaders(FastaiDataLoader(Same(x,y), bs=None, num_workers=0), [(x,y)])
    learn = learner(model, data=data, lr=1e-3)
    def iteration():
        for o in 'after_pred','after_step','after_batch': swa(o)
    try: fit(learn, 1, cbs=[swa, Middle(lambda: do(iteration))])
    except Enough: pass

def costs(model, x, y, rounds):
    "Seconds, in each round, of a step, of one pass over the weights, and of what SWA does"
    n = sum(p.numel() for p in model.parameters())
    (a,b),avg = torch.randn(2, n),WeightAverage(model)
    loss_func,opt = CrossEntropyLossFlat(),sgd(trainable_params(model), lr=1e-3)
    def step():
        loss_func(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    parts = dict(step=step, flat_pass=lambda: a.add_(b), update=lambda: avg.update(model),
                 finite_check=lambda: all_finite(model.parameters()), list_of_layers=lambda: bn_layers(model))
    quick,res = 5 if n>1e6 else 50,{}
    def measure(collect, idle):
        fs = dict(parts, collection=collect, idle_iteration=idle)
        res.update(times(rounds, {k:1 if k=='step' and n>1e6 else quick for k in fs}, **fs))
    every,none = SWA(start=0, cycle_len=1/MANY, check=False),SWA(start=0, cycle_len=1, check=False)
    in_a_fit(model, x, y, every, lambda collect: in_a_fit(model, x, y, none, lambda idle: measure(collect, idle)))
    assert every.n_averaged>rounds and not none.n_averaged
    return res

def steps(name, model, x, y, rounds):
    res,n = costs(model, x, y, rounds),sum(p.numel() for p in model.parameters())
    print(f'{name}: {n:,} weights in {len(list(model.parameters()))} tensors; one step takes '
          f'{1e3*median(res["step"]):.1f} ms, one flat pass {1e3*median(res["flat_pass"]):.3f} ms')
    print(f'  {"":34}{"flat passes":>12}{"% of a step":>14}')
    for k in 'collection','update','finite_check','list_of_layers','idle_iteration':
        print(f'  {k.replace("_"," "):34}{times_of(res, k, "flat_pass"):12.2f}{100*times_of(res, k, "step"):14.3f}')
    for k in 1,10,100:
        rows = zip(res['step'], res['collection'], res['idle_iteration'])
        own = [(step,collect/k+(1-1/k)*idle) for step,collect,idle in rows]
        print(f'  averaging every {k:3} iterations takes {100*median(o/(step+o) for step,o in own):.2f}% of the fit')

def main(rounds=15):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    seed()
    for n,px in (32,64),(8,32):
        x,y = torch.randn(n,3,px,px),torch.randint(0,10,(n,))
        steps(f'resnet18, {n} pictures of {px} pixels', resnet18(num_classes=10), x, y, rounds)
    steps('a tiny network, 64 pictures of 8 pixels', net(), X[:64], Y[:64], rounds)

if __name__=='__main__': main(*map(int, sys.argv[1:]))
