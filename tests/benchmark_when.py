"""When does averaging help, and when not? `python tests/benchmark_when.py [seeds] [epochs]`

The demo's digits and CNN, with a fifth of the training labels wrong and with all of them right; every method on the same seeds and budget.
Differences are paired with SGD (with one-cycle for the one-cycle rows) on the same seed: mean ± standard error, and on how many seeds it was better."""
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from fastai.callback.schedule import ParamScheduler
from fastai.optimizer import Adam
from sklearn.datasets import load_digits
from fastswa.callback import SWA
from fastswa.demo import demo_learner, demo_scores, demo_split
from fastswa.schedule import sched_authors

def learner(seed, clean):
    learn = demo_learner(seed)
    if clean: learn.dls.train.dataset.tensors[1].copy_(torch.tensor(load_digits().target)[demo_split(seed)[0]])
    return learn

def sgd(learn, n): learn.fit(n, cbs=ParamScheduler({'lr': sched_authors(.2, .002, 1.)}))
def constant(learn, n): learn.fit(n)
def swa(learn, n, **kw): learn.fit(n, cbs=SWA(**kw))
def one_cycle(learn, n, cbs=None):
    learn.opt_func = partial(Adam, wd=.01)
    learn.fit_one_cycle(n, 1e-2, cbs=cbs)

arms = {'SGD, annealed': sgd, 'SGD, constant rate, last weights': constant, 'SWA(swa_lr=lr)': partial(swa, swa_lr=.2), 'SWA()': swa,
        'SWA(start=.95), few snapshots': partial(swa, start=.95, cycle_len=.5),
        'one-cycle, Adam': one_cycle, 'one-cycle, SWA(swa_lr=False)': lambda l,n: one_cycle(l, n, SWA(swa_lr=False)), 'one-cycle, SWA()': lambda l,n: one_cycle(l, n, SWA())}

def paired(a, b, sign=1):
    d = [sign*(x-y) for x,y in zip(a,b)]
    return f'{mean(d):+.3f} ± {stdev(d)/len(d)**.5:.3f} ({sum(o<0 for o in d)}/{len(d)})'

def main(seeds=10, epochs=30):
    import warnings
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    for clean in (False,True):
        res = {k:[] for k in arms}
        for seed in range(200, 200+seeds):
            for k,f in arms.items():
                learn = learner(seed, clean)
                with learn.no_bar(), learn.no_logging(): f(learn, epochs)
                res[k].append(demo_scores(learn))
        print(f'{"clean labels" if clean else "20% wrong labels"}, {epochs} epochs, {seeds} seeds\n\n| | test error, % | test loss | error against baseline (better on) | loss against baseline (better on) |\n|---|---|---|---|---|')
        for k,v in res.items():
            err,loss = [100*(1-o['accuracy']) for o in v],[o['test_loss'] for o in v]
            base = res['one-cycle, Adam' if k.startswith('one') else 'SGD, annealed']
            berr,bloss = [100*(1-o['accuracy']) for o in base],[o['test_loss'] for o in base]
            print(f'| {k} | {mean(err):.2f} | {mean(loss):.3f} | ' + (' | |' if base is v else f'{paired(err,berr)} | {paired(loss,bloss)} |'), flush=True)
        print()

if __name__=='__main__': main(*map(int, sys.argv[1:]))
