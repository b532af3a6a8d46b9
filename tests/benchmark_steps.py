"""What it costs to average every step, as ratios measured in one process: `python tests/benchmark_steps.py [rounds]`

A collection is all that SWA does at the end of a cycle: look ahead, check that the weights are finite, list the BatchNorm layers, update the mean.
Rounds, clock and medians as in `benchmark_cost.py`. Not a test: nothing is asserted, numbers within 10% of each other are ties on a shared machine."""
import random, sys, time, warnings
from statistics import median

from torchvision.models import resnet18
from common import *
from fastswa.average import WeightAverage, all_finite
from fastswa.batchnorm import bn_layers
from fastswa.callback import SWA

warnings.filterwarnings('ignore')
torch.set_num_threads(1)
rounds = int(sys.argv[1]) if len(sys.argv)>1 else 15
MANY = 10**6   # iterations in the fit that is planned: more than are ever timed

def clock(f):
    t = time.thread_time(); f()
    return time.thread_time()-t

def times(reps, **fs):
    "Seconds of each contender in each round, the contenders of a round in a random order; `reps` calls are timed together"
    for f in fs.values(): f()
    res = {k:[] for k in fs}
    for _ in range(rounds):
        for k in random.sample(list(fs), len(fs)): res[k].append(clock(lambda: [fs[k]() for _ in range(reps.get(k, 1))])/reps.get(k, 1))
    return res

def times_of(res, k, base): return median(a/b for a,b in zip(res[k], res[base]))

class Ready(SWA):
    "SWA that believes itself in a fit of `MANY` iterations, of which each is averaged"
    def get_ready(self, learn):
        self.learn = learn
        self._cycles,self._active,self._epoch,self._done = self._plan(1, MANY),True,0,0
        self._resume_or_reset(learn.model); self._begun(); self._look_ahead()
        return self
    def one(self): self._done += 1; self._moved = True; self._collect()
    def idle(self):
        "The two events of an iteration that ends no cycle"
        self._done,self._due = 0,MANY
        self.after_pred(); self.after_batch()
        self._lrs.clear()

def steps(name, model, x, y, lr=1e-3):
    l = Learner(DataLoaders([(x,y)],[(x,y)]), model, loss_func=CrossEntropyLossFlat(), opt_func=sgd, lr=lr)
    l.create_opt(); l.model.train()
    n = sum(p.numel() for p in model.parameters())
    a,b,avg = *torch.randn(2, n),WeightAverage(model)
    swa = Ready(start=0, cycle_len=1/MANY).get_ready(l)
    for _ in range(2): swa.one(); avg.update(model)
    def step(): loss = l.loss_func(l.model(x), y); loss.backward(); l.opt.step(); l.opt.zero_grad()
    parts = dict(step=step, flat_pass=lambda: a.add_(b), collection=swa.one, update=lambda: avg.update(model), finite_check=lambda: all_finite(model.parameters()),
                 list_of_layers=lambda: bn_layers(model), idle_iteration=swa.idle)
    quick = 5 if n>1e6 else 50
    res = times({k:1 if k=='step' and n>1e6 else quick for k in parts}, **parts)
    print(f'{name}: {n:,} weights in {len(list(model.parameters()))} tensors; one step takes {1e3*median(res["step"]):.1f} ms, one flat pass {1e3*median(res["flat_pass"]):.3f} ms')
    print(f'  {"":34}{"flat passes":>12}{"% of a step":>14}')
    for k in list(parts)[2:]: print(f'  {k.replace("_"," "):34}{times_of(res, k, "flat_pass"):12.2f}{100*times_of(res, k, "step"):14.3f}')
    for k in (1,10,100):
        share = median((c/k+(1-1/k)*i)/(s+c/k+(1-1/k)*i) for c,i,s in zip(res['collection'],res['idle_iteration'],res['step']))
        print(f'  averaging every {k:3} iterations takes {100*share:.2f}% of the fit')
    swa._active = False

seed()
steps('resnet18, 32 pictures of 64 pixels', resnet18(num_classes=10), torch.randn(32,3,64,64), torch.randint(0,10,(32,)))
steps('resnet18, 8 pictures of 32 pixels', resnet18(num_classes=10), torch.randn(8,3,32,32), torch.randint(0,10,(8,)))
steps('a tiny network, 64 pictures of 8 pixels', net(), X[:64], Y[:64])
