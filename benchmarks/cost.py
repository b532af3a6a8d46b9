"""What averaging costs, as ratios measured in one process: `python benchmarks/cost.py [rounds]`

Every round times all contenders in a random order on this thread's CPU clock; a ratio is taken within a round, and the
median over rounds is kept in `cost.json` beside this file. Not a test: nothing is asserted, numbers within 10% of each
other are ties on a shared machine."""
import io, json, random, sys, time, warnings
from pathlib import Path
from statistics import median

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent/'tests')]    # this checkout, and the learners of its tests
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn as torch_update_bn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision import transforms as T
from torchvision.models import resnet18
from common import *
from fastai.layers import ConvLayer
from fastswa.average import WeightAverage, all_finite
from fastswa.batchnorm import bn_layers, update_bn
from fastswa.callback import SWA

def clock(f):
    t = time.thread_time()
    f()
    return time.thread_time()-t

def ratios(rounds, base, **others):
    "Median over rounds of each contender's time as a multiple of `base`'s"
    fs,rs = [base,*others.values()],[]
    for f in fs: f()
    for _ in range(rounds):
        ts = {}
        # whoever comes second may find the weights in the cache
        for i in random.sample(range(len(fs)), len(fs)): ts[i] = clock(fs[i])
        rs.append([ts[i]/ts[0] for i in range(1, len(fs))])
    return dict(zip(others, map(median, zip(*rs))))

def show(title, res):
    "Print a table and give it back"
    print(title)
    for k,v in res.items(): print(f'  {k.replace("_"," "):45} {v:8.3f}', flush=True)
    return {k:round(v, 3) for k,v in res.items()}

# Single steps

def flat_copies(m):
    ps = [p.detach() for p in m.parameters()]
    return ps,[p.clone() for p in ps]

def updates(rounds, name, m):
    avg,ref = WeightAverage(m),AveragedModel(m)
    ps,own = flat_copies(m)
    a,b = torch.randn(2, sum(p.numel() for p in ps))
    for _ in range(2):
        avg.update(m)
        ref.update_parameters(m)
    def snapshot():
        "What SWA does at the end of a cycle"
        assert all_finite(m.parameters())
        bn_layers(m)
        avg.update(m)
    return show(f'One snapshot, {name} (1 = adding one flat vector to another)', ratios(rounds, lambda: a.add_(b),
        snapshot=snapshot, its_check_for_finite_values=lambda: all_finite(m.parameters()),
        its_update=lambda: avg.update(m), cached__foreach_lerp_=lambda: torch._foreach_lerp_(own, ps, .1),
        AveragedModel=lambda: ref.update_parameters(m)))

def swaps(rounds, name, m):
    avg,(ps,own) = WeightAverage(m),flat_copies(m)
    avg.update(m)
    def swap():
        with avg.swapped(m): pass
    res = ratios(rounds, lambda: torch._foreach_copy_(own, ps), swapped=swap)
    return show(f'Average in and out, {name} (1 = one copy of the weights)', res)

def refreshes(rounds, name, m, xs):
    m.train()
    def forward():
        with torch.no_grad():
            for x in xs: m(x)
    res = ratios(rounds, forward, update_bn=lambda: update_bn(m, xs, pbar=False),
                 torch_update_bn=lambda: torch_update_bn(xs, m))
    return show(f'BatchNorm refresh, {name} (1 = a forward pass without gradients)', res)

# Whole fits

class Timed(SWA):
    "SWA that adds up the time spent in its events"
    spent = 0.
    def __call__(self, ev):
        t = time.thread_time()
        try: return super().__call__(ev)
        finally: self.spent += time.thread_time()-t

class Pictures(torch.utils.data.Dataset):
    "JPEG files that are decoded, and augmented for training, item by item"
    def __init__(self, n, px=160, train=True):
        x,buf = torch.rand(1,3,16,16, generator=torch.Generator().manual_seed(0)),io.BytesIO()
        Image.fromarray(F.interpolate(255*x, px)[0].permute(1,2,0).byte().numpy()).save(buf, 'jpeg')
        self.n,self.file = n,buf.getvalue()
        aug = [T.RandomResizedCrop(32), T.RandomHorizontalFlip(), T.ColorJitter(.2,.2,.2), T.RandomRotation(10)]
        self.tfms = T.Compose([*(aug if train else [T.Resize(32)]), T.ToTensor()])
    def __len__(self): return self.n
    def __getitem__(self, i): return self.tfms(Image.open(io.BytesIO(self.file)).convert('RGB')),i%10

def compute_bound():
    def part(n): return TensorDataset(torch.randn(n,3,64,64), torch.randint(0,10,(n,)))
    return part(320),part(96),resnet18(num_classes=10)

def loader_bound():
    net = nn.Sequential(ConvLayer(3,16,stride=2), ConvLayer(16,32,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(32,10))
    return Pictures(320),Pictures(96, train=False),net

def one_fit(make, epochs=2, **kw):
    "Time that SWA takes, in epochs of the same fit without it"
    train,valid,model = make()
    data = DataLoaders(TorchLoader(train, 32, shuffle=True), TorchLoader(valid, 32))
    learn,swa,ends = learner(model, data=data, opt_func=SGD, lr=.01),Timed(start=0, cycle_len=1, **kw),[]
    class Clock(Callback):    # the end is in helpers of SWA: between the first and the last callback of after_fit
        order = -1000
        def after_fit(self): ends.append(time.thread_time())
    t = time.thread_time()
    fit(learn, epochs, cbs=[swa,Clock()])
    now = time.thread_time()
    own = swa.spent+now-ends[0]
    return epochs*own/(now-t-own)

def fits(rounds, name, make):
    "Time of SWA, a snapshot an epoch and what comes at the end, in epochs of the fit without it"
    # the check is bounded by the length of the fit, and left out of shorter ones
    arms = {'SWA()':dict(epochs=10), 'SWA(check=False)':dict(check=False),
            'SWA(eval_every=1)':dict(eval_every=1, check=False)}
    res = {k:[] for k in arms}
    for _ in range(rounds):
        for k in random.sample(list(arms), len(arms)): res[k].append(one_fit(make, **arms[k]))
    return show(f'{name}: time of SWA, in epochs', {k:median(v) for k,v in res.items()})

# Tables of what is stored

def stored(): return json.loads((here/'cost.json').read_text())

def table(title, cols, rows):
    rows = [f'| {k} | {" | ".join(v)} |' for k,v in rows]
    return '\n'.join([f'| {title} | {" | ".join(cols)} |', '|---|'+'---:|'*len(cols), *rows])

def fit_table(res):
    "How many percent longer a fit takes: statistics come once, whatever its epochs; the check grows with it"
    def row(name, f): return name,[f'{100*f(o):.2g}%' for o in res['fits'].values()]
    def once(o): return o['SWA(check=False)']
    rows = [row(f'averaging and BatchNorm statistics, {n} epochs', lambda o: once(o)/n) for n in (5,10,50)]
    # measured in fits of 10 epochs, and of 2
    rows += [row('the check, in a fit of 10 epochs', lambda o: (o['SWA()']-once(o))/10),
             row('each epoch that `eval_every` evaluates', lambda o: (o['SWA(eval_every=1)']-once(o))/2)]
    return table('a fit takes longer by', list(res['fits']), rows)

def step_tables(res):
    "Single steps, each table in one unit"
    def num(x): return f'{x:.2f}' if x<10 else f'{x:.0f}'
    def rows(part, *keys): return [(k, [num(v[o]) for o in keys]) for k,v in res[part].items()]
    return [table('one snapshot (1 = adding one vector of that size to another)',
                  ['fastswa', 'of it, the check for finite values', 'torch `AveragedModel`'],
                  rows('snapshots', 'snapshot', 'its_check_for_finite_values', 'AveragedModel')),
            table('BatchNorm refresh (1 = a forward pass without gradients)', ['fastswa', 'torch `update_bn`'],
                  rows('refreshes', 'update_bn', 'torch_update_bn')),
            table('the average into the model and out again (1 = copying the weights once)', ['fastswa'],
                  rows('swaps', 'swapped'))]

def main(rounds=15):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    tiny = nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(2000)])
    nets = {'resnet18, 11.7M weights in 62 tensors':resnet18(), '2000 tensors of 64 weights':tiny}
    stem = nn.Sequential(nn.Conv2d(3,32,4,4), nn.BatchNorm2d(32), nn.Flatten(2), nn.Linear(64,64),
                         nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 4))
    with_bn = {'resnet18, 32 pixels':resnet18(), 'a BatchNorm stem, then a transformer':stem}
    xs = torch.randn(3,32,3,32,32)
    kinds = {'compute-bound':compute_bound, 'loader-bound':loader_bound}
    res = dict(fits={k:fits(max(3, rounds//3), k, f) for k,f in kinds.items()},
               snapshots={k:updates(rounds, k, m) for k,m in nets.items()},
               swaps={k:swaps(rounds, k, m) for k,m in nets.items()},
               refreshes={k:refreshes(rounds, k, m, list(xs)) for k,m in with_bn.items()})
    (here/'cost.json').write_text(json.dumps(res, indent=1)+'\n')
    print('', fit_table(res), *step_tables(res), sep='\n\n')

if __name__=='__main__': main(*map(int, sys.argv[1:]))
