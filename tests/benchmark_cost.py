"""What averaging costs, as ratios measured in one process: `python tests/benchmark_cost.py [rounds]`

Every round times all contenders in a random order on this thread's CPU clock; a ratio is taken within a round, and the median over rounds is printed.
Not a test: nothing is asserted, numbers within 10% of each other are ties on a shared machine."""
import inspect, io, sys, time, warnings
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn as torch_update_bn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision.models import resnet18
from torchvision import transforms as T
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
        for i in random.sample(range(len(fs)), len(fs)): ts[i] = clock(fs[i])   # whoever comes second may find the weights in the cache
        rs.append([ts[i]/ts[0] for i in range(1, len(fs))])
    return dict(zip(others, map(median, zip(*rs))))

def show(title, res):
    print(title)
    for k,v in res.items(): print(f'  {k.replace("_"," "):45} {v:8.3f}', flush=True)

# Single steps

def swap(avg, m):
    with avg.swapped(m): pass

def updates(rounds, name, m):
    avg,ref = WeightAverage(m),AveragedModel(m)
    ps = [p.detach() for p in m.parameters()]
    own,a,b = [p.clone() for p in ps],*torch.randn(2, sum(p.numel() for p in ps))
    for _ in range(2):
        avg.update(m)
        ref.update_parameters(m)
    def snapshot():
        "What SWA does at the end of a cycle"
        assert all_finite(m.parameters())
        bn_layers(m)
        avg.update(m)
    show(f'One snapshot, {name} (1 = adding one flat vector to another)',
         ratios(rounds, lambda: a.add_(b), snapshot=snapshot, its_check_for_finite_values=lambda: all_finite(m.parameters()), its_update=lambda: avg.update(m),
                cached__foreach_lerp_=lambda: torch._foreach_lerp_(own, ps, .1), AveragedModel=lambda: ref.update_parameters(m)))
    show(f'Average in and out, {name} (1 = one copy of the weights)', ratios(rounds, lambda: torch._foreach_copy_(own, ps), swapped=lambda: swap(avg, m)))

def forward(m, xs):
    with torch.no_grad():
        for x in xs: m(x)

def refreshes(rounds, name, m, xs):
    m.train()
    show(f'BatchNorm refresh, {name} (1 = a forward pass without gradients)',
         ratios(rounds, lambda: forward(m, xs), update_bn=lambda: update_bn(m, xs, pbar=False), torch_update_bn=lambda: torch_update_bn(xs, m)))

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
        g,buf = torch.Generator().manual_seed(0),io.BytesIO()
        Image.fromarray(F.interpolate(255*torch.rand(1,3,16,16, generator=g), px)[0].permute(1,2,0).byte().numpy()).save(buf, 'jpeg')
        self.n,self.file = n,buf.getvalue()
        aug = [T.RandomResizedCrop(32), T.RandomHorizontalFlip(), T.ColorJitter(.2,.2,.2), T.RandomRotation(10)] if train else [T.Resize(32)]
        self.tfms = T.Compose([*aug, T.ToTensor()])
    def __len__(self): return self.n
    def __getitem__(self, i): return self.tfms(Image.open(io.BytesIO(self.file)).convert('RGB')),i%10

def compute_bound():
    def part(n): return TensorDataset(torch.randn(n,3,64,64), torch.randint(0,10,(n,)))
    return part(320),part(96),resnet18(num_classes=10)

def loader_bound(): return Pictures(320),Pictures(96, train=False),nn.Sequential(ConvLayer(3,16,stride=2), ConvLayer(16,32,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,10))

def one_fit(make, epochs=2, **kw):
    "Time that SWA takes, in epochs of the same fit without it"
    train,valid,model = make()
    l = learner(model, data=DataLoaders(TorchLoader(train, 32, shuffle=True), TorchLoader(valid, 32)), opt_func=SGD, lr=.01)
    swa,ends = Timed(start=0, cycle_len=1, **kw),[]
    class Clock(Callback):       # what comes at the end is in helpers of SWA: between the first and the last callback of after_fit
        order = -1000
        def after_fit(self): ends.append(time.thread_time())
    t = time.thread_time()
    fit(l, epochs, cbs=[swa,Clock()])
    now = time.thread_time()
    own = swa.spent+now-ends[0]
    return epochs*own/(now-t-own)

def fits(rounds, name, make):
    "A snapshot an epoch; at the end statistics, and the check"
    arms = {'SWA()':{}, 'SWA(eval_every=1)':dict(eval_every=1)}
    if 'check' in inspect.signature(SWA).parameters: arms |= {k.replace(')', ', check=False)').replace('(, ','('):dict(kw, check=False) for k,kw in arms.items()}
    res = {k:[] for k in arms}
    for _ in range(rounds):
        for k in random.sample(list(arms), len(arms)): res[k].append(one_fit(make, **arms[k]))
    # what is evaluated in each epoch is in the fit of two epochs twice, what comes at its end once
    once = {k:median(v) for k,v in res.items()}
    show(f'{name}: time of SWA in a fit of 2 epochs, in epochs', once)
    for k,v in once.items():
        for n in (5,10,50):
            if 'eval' not in k: print(f'  a fit of {n} epochs takes {100*v/n:.1f}% longer with {k}')
        if 'eval' in k: print(f'  each epoch that is evaluated takes {100*(v-once[k.replace("eval_every=1, ","").replace("eval_every=1","")])/2:.0f}% longer with {k}')

def main(rounds=15):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    fits(max(3, rounds//3), 'Compute-bound, resnet18, 320 pictures of 64 pixels', compute_bound)
    fits(max(3, rounds//3), 'Loader-bound, 320 JPEGs decoded and augmented, a small network', loader_bound)
    updates(rounds, 'resnet18, 11.7M weights in 62 tensors', resnet18())
    updates(rounds, '2000 tensors of 64', nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(2000)]))
    refreshes(rounds, 'resnet18, 32 pixels', resnet18(), [torch.randn(32,3,32,32) for _ in range(3)])
    refreshes(rounds, 'a BatchNorm stem and a transformer', nn.Sequential(nn.Conv2d(3,32,4,4), nn.BatchNorm2d(32), nn.Flatten(2), nn.Linear(64,64),
              nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 4)), [torch.randn(32,3,32,32) for _ in range(3)])

if __name__=='__main__': main(*map(int, sys.argv[1:]))
