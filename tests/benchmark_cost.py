"""What averaging costs, as ratios measured in one process: `python tests/benchmark_cost.py [rounds]`

Every round times all contenders in a random order on this thread's CPU clock; a ratio is taken within a round, and the median over rounds is printed.
Not a test: nothing is asserted, numbers within 10% of each other are ties on a shared machine."""
import sys, time, warnings
from statistics import median

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn as torch_update_bn
from torchvision.models import resnet18
from common import *
from fastswa.average import WeightAverage
from fastswa.batchnorm import update_bn
from fastswa.callback import SWA

warnings.filterwarnings('ignore')
torch.set_num_threads(1)
rounds = int(sys.argv[1]) if len(sys.argv)>1 else 15

def clock(f):
    t = time.thread_time(); f()
    return time.thread_time()-t

def ratios(base, **others):
    "Median over rounds of each contender's time as a multiple of `base`'s"
    fs,rs = [base,*others.values()],[]
    for f in fs: f()
    for _ in range(rounds):
        ts = {}
        for i in random.sample(range(len(fs)), len(fs)): ts[i] = clock(fs[i])   # whoever comes second may find the weights in the cache
        rs.append([ts[i]/ts[0] for i in range(1, len(fs))])
    return dict(zip(others, map(median, zip(*rs))))

def show(title, res):
    print(title)
    for k,v in res.items(): print(f'  {k.replace("_"," "):45} {v:8.3f}')

def swap(avg, m):
    with avg.swapped(m): pass

def updates(name, m):
    avg,ref = WeightAverage(m),AveragedModel(m)
    ps = [p.detach() for p in m.parameters()]
    own,a,b = [p.clone() for p in ps],*torch.randn(2, sum(p.numel() for p in ps))
    for _ in range(2): avg.update(m); ref.update_parameters(m)
    show(f'One update, {name} (1 = adding one flat vector to another)', ratios(lambda: a.add_(b), WeightAverage=lambda: avg.update(m),
        cached__foreach_lerp_=lambda: torch._foreach_lerp_(own, ps, .1), AveragedModel=lambda: ref.update_parameters(m)))
    show(f'Average in and out, {name} (1 = one copy of the weights)', ratios(lambda: torch._foreach_copy_(own, ps), swapped=lambda: swap(avg, m)))

def forward(m, xs):
    with torch.no_grad():
        for x in xs: m(x)

def refreshes(name, m, xs):
    m.train()
    show(f'BatchNorm refresh, {name} (1 = a forward pass without gradients)',
         ratios(lambda: forward(m, xs), update_bn=lambda: update_bn(m, xs, pbar=False), torch_update_bn=lambda: torch_update_bn(xs, m)))

class Timed(SWA):
    "SWA that adds up the time spent in its events"
    def __call__(self, ev):
        t = time.thread_time()
        try: return super().__call__(ev)
        finally: self.spent[ev] = self.spent.get(ev, 0)+time.thread_time()-t

def fits(epochs=2):
    "Time inside SWA over the time of the rest of the fit"
    data = torch.utils.data.TensorDataset(torch.randn(960,3,32,32), torch.randint(0,10,(960,)))
    dl = torch.utils.data.DataLoader(data, 32, shuffle=True)
    def one(**kw):
        l = learner(resnet18(num_classes=10), data=DataLoaders(dl, torch.utils.data.DataLoader(data, 32, sampler=range(160))), opt_func=SGD, lr=.01)
        swa,ends = Timed(start=0, cycle_len=1, **kw),[]
        swa.spent = {}
        class Clock(Callback):       # the refresh runs in a helper of SWA: between the first and the last callback of after_fit
            order = -1000
            def after_fit(self): ends.append(time.thread_time())
        t = time.thread_time()
        fit(l, epochs, cbs=[swa,Clock()])
        now = time.thread_time()
        return sum(swa.spent.values()),now-ends[0],now-t
    averaging,refresh,evaluation = [],[],[]
    for _ in range(3):
        s,r,t = one(); averaging.append(s/(t-s-r)); refresh.append(r/(t-s-r))
        s,r,t = one(eval_every=1); evaluation.append((s+r)/(t-s-r))
    show(f'Within a fit of {epochs} epochs of 30 batches, resnet18, 32 pixels (time in SWA over the rest)',
         {'averaging each epoch': median(averaging), '- one collection, in training steps': median(averaging)*30, 'the final refresh': median(refresh), 'refresh and evaluation each epoch': median(evaluation)})

updates('resnet18, 11.7M weights in 62 tensors', resnet18())
updates('2000 tensors of 64', nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(2000)]))
refreshes('resnet18, 32 pixels', resnet18(), [torch.randn(32,3,32,32) for _ in range(3)])
refreshes('a BatchNorm stem and a transformer', nn.Sequential(nn.Conv2d(3,32,4,4), nn.BatchNorm2d(32), nn.Flatten(2), nn.Linear(64,64),
          nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 4)), [torch.randn(32,3,32,32) for _ in range(3)])
fits()
