"Small learners on bundled data, and callbacks that watch them"
import contextlib, random, warnings
from functools import partial

import numpy as np, torch
from fastai.basics import *
from fastai.callback.all import *
from fastai.data.load import DataLoader as FastaiDataLoader
from sklearn.datasets import load_digits
from torch import nn

def seed(s=0): torch.manual_seed(s); random.seed(s); np.random.seed(s)

d = load_digits()
X,Y = torch.tensor(d.images/16, dtype=torch.float32)[:,None],torch.tensor(d.target)

def net(p=0.):
    seed()
    return nn.Sequential(nn.Conv2d(1,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Dropout(p), nn.Flatten(), nn.Linear(64,10))
def plain_net(): return nn.Sequential(nn.Flatten(), nn.Linear(64,20), nn.ReLU(), nn.Linear(20,10))

def dls(n=200, bs=40, n_valid=100, workers=0, shuffle=True, drop_last=True):
    tr,va = list(zip(X[:n],Y[:n])),list(zip(X[n:n+n_valid],Y[n:n+n_valid]))
    return DataLoaders(FastaiDataLoader(tr, bs=bs, shuffle=shuffle, drop_last=drop_last, num_workers=workers), FastaiDataLoader(va, bs=64, num_workers=workers))

sgd = partial(SGD, mom=.9, decouple_wd=False)
def learner(model=None, cbs=None, s=0, opt_func=sgd, lr=.1, metrics=accuracy, path='.', splitter=trainable_params, data=None, **kw):
    "A learner that is the same each time it is made; kw go to `dls`"
    seed(s)
    data = dls(**kw) if data is None else data
    return Learner(data, net() if model is None else model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, metrics=metrics, cbs=cbs,
                   path=Path(path), splitter=splitter)

def two_groups(m): return [list(m[:4].parameters()), list(m[4:].parameters())]

def quiet(learn): return contextlib.ExitStack() if learn is None else _Quiet(learn)
class _Quiet(contextlib.ExitStack):
    def __init__(self, learn):
        super().__init__()
        self.learn = learn
    def __enter__(self):
        super().__enter__()
        self.enter_context(self.learn.no_bar()); self.enter_context(self.learn.no_logging())
        return self.learn

def fit(learn, *args, method='fit', **kw):
    with quiet(learn): getattr(learn, method)(*args, **kw)
    return learn

def weights(m): return [p.detach().clone() for p in m.parameters()]
def state(m): return {k:v.detach().clone() for k,v in m.state_dict().items()}
def same(a, b): return list(a)==list(b) and all(torch.equal(a[k],b[k]) for k in a) if isinstance(a, dict) else all(torch.equal(x,y) for x,y in zip(a,b)) and len(a)==len(b)

class Spy(Callback):
    "Keeps the weights after each iteration, and the learning rate of each step"
    order,run_valid = 1000,False
    def before_fit(self): self.ws,self.lrs = [],[]
    def after_batch(self): self.ws.append(weights(self.learn.model)); self.lrs.append([h['lr'] for h in self.learn.opt.hypers])
    def mean(self, its): return [torch.stack([self.ws[i-1][k].double() for i in its]).mean(0) for k in range(len(self.ws[0]))]

def rng_fingerprint(learn):
    dl = learn.dls.train
    own = dl.rng.getstate() if hasattr(dl, 'rng') else None
    return torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum().item(), np.random.get_state()[2], own
