"""In which fits does averaging help? `python benchmarks/when.py [--seeds N]`, and `--show` for the tables alone

Each fit is run without SWA and with it, on the same digits, wrong labels, first weights and batches. Measured are the
last weights without SWA, the average, and the last weights of the walk that was averaged: all with BatchNorm statistics
measured for them, so that what the mean adds and what comes of the learning rate that SWA holds can be told apart. What
each fit gave is written to `when.json` beside this file; what is there already is not computed again (remove the file
for that: half an hour on one core)."""
import argparse, json, sys, warnings
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))    # this checkout
import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from fastai.layers import ConvLayer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset
from fastswa.all import *
from fastswa.demo import TensorLoader, demo_learner, wrong_labels

n_train,n_valid = 600,250    # the other 947 digits are for testing

def split(seed):
    "Indices for training, for choosing a window, and for testing"
    y = load_digits().target
    train,rest = train_test_split(np.arange(len(y)), train_size=n_train, stratify=y, random_state=seed)
    valid,test = train_test_split(rest, train_size=n_valid, stratify=y[rest], random_state=seed)
    return train,valid,test

def net():
    return nn.Sequential(ConvLayer(1,16), ConvLayer(16,32,stride=2), ConvLayer(32,64,stride=2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(64,10))

def make(seed, wrong):
    "A learner with fastai's own Adam, whose DataLoaders are training, validation and test"
    d = load_digits()
    x,y = torch.tensor(d.images/16, dtype=torch.float32)[:,None],torch.tensor(d.target)
    ds = [TensorDataset(x[o], y[o]) for o in map(torch.tensor, split(seed))]
    if wrong: ds[0] = TensorDataset(ds[0].tensors[0], wrong_labels(ds[0].tensors[1], seed))
    set_seed(seed)
    train,*rest = TensorLoader(ds[0], bs=50, shuffle=True),*(TensorLoader(o, bs=len(o)) for o in ds[1:])
    dls = DataLoaders(train, *rest, device=torch.device('cpu'))
    return Learner(dls, net(), loss_func=CrossEntropyLossFlat())

@lru_cache(1)
def body(seed):
    "Weights of a body that has learned to read the training pictures, their right labels, turned by a quarter"
    learn = make(seed, False)
    x = learn.dls.train.dataset.tensors[0]
    x.copy_(torch.rot90(x, 1, (2,3)))
    with quiet(learn): learn.fit_one_cycle(10, 5e-3)
    return learn.model[:3].state_dict()

def pretrained(seed, wrong):
    "A learner with such a body, to be fine-tuned"
    weights,learn = body(seed),make(seed, wrong)
    learn.model[:3].load_state_dict(weights)
    return learn

def quiet(learn): return ContextManagers([learn.no_bar(), learn.no_logging()])

# The fits: what is called, the rate that `SWA(swa_lr=lr)` holds (where it is constant, so that this is the fit's own
# walk), whether labels are wrong

def call(name, *args, make=make, lr=None, wrong=False): return dict(name=name, args=args, make=make, lr=lr, wrong=wrong)

fits = {'fit(5)':                 call('fit', 5, lr=1e-3),
        'fit(20)':                call('fit', 20, lr=1e-3),
        'fit(60, 5e-3)':          call('fit', 60, 5e-3, lr=5e-3),
        'fit_one_cycle(2, 1e-2)': call('fit_one_cycle', 2, 1e-2),
        'fit_one_cycle(5)':       call('fit_one_cycle', 5),
        'fit_one_cycle(40)':      call('fit_one_cycle', 40),
        'fine_tune(3)':           call('fine_tune', 3, make=pretrained),
        'fine_tune(15)':          call('fine_tune', 15, make=pretrained)}
noisy = {'fit(60)': call('fit', 60, lr=1e-3), 'fit_one_cycle(40, 1e-2)': call('fit_one_cycle', 40, 1e-2)}
also_noisy = 'fit(5)', 'fit(60)', 'fit(60, 5e-3)', 'fit_one_cycle(5)', 'fit_one_cycle(40)', 'fit_one_cycle(40, 1e-2)'
fits |= {f'{k}, a fifth wrong':dict((fits|noisy)[k], wrong=True) for k in also_noisy}

# What is measured

class Walk(Callback):
    "Keeps the weights that SWA collects"
    order,run_valid = SWA.order+1,False
    def __init__(self, swa): self.swa,self.ws = swa,[]
    def _take(self):
        if len(self.swa.collected)==len(self.ws): return
        self.ws.append([p.detach().clone() for p in self.learn.model.parameters()])
    def after_batch(self): self._take()
    def after_train(self): self._take()

def score(learn, i):
    "Loss, and errors in %, on the data of the `i`th loader"
    x,y = learn.dls[i].dataset.tensors
    with torch.no_grad(): out = learn.model.eval()(x)
    return dict(loss=F.cross_entropy(out, y).item(), err=100*(out.argmax(1)!=y).float().mean().item())

def at(learn, ws):
    "`learn` with these weights, and statistics measured for them"
    with torch.no_grad():
        for p,w in zip(learn.model.parameters(), ws): p.copy_(w)
    with quiet(learn): learn.update_bn()

def measured(learn, test=2):
    with quiet(learn): learn.update_bn()
    return score(learn, test)

def swa_scores(learn, swa, walk=None, test=2):
    """The average, the last weights with running and with measured statistics, and the mean of as many last points as
    have the lowest validation loss"""
    res = dict(n=swa.n_averaged, mean=score(learn, test))
    swa.restore(learn)
    res |= dict(running=score(learn, test), last=measured(learn, test))
    if walk is None: return res
    found = []
    for k in sorted({1,2,3,5,10,len(walk.ws)}):
        if k>len(walk.ws): continue
        at(learn, [torch.stack(o).mean(0) for o in zip(*walk.ws[-k:])])
        found.append((score(learn, 1)['loss'], k, score(learn, test)))
    _,window,chosen = min(found, key=lambda o: o[0])
    return dict(res, window=window, chosen=chosen)

def train(f, seed, **kw):
    "One fit, without SWA if there are no arguments for it"
    learn = f['make'](seed, f['wrong'])
    swa = SWA(check=False, **kw) if kw else None
    walk = swa and Walk(swa)
    with quiet(learn): getattr(learn, f['name'])(*f['args'], cbs=[swa,walk] if kw else None)
    return dict(running=score(learn, 2), last=measured(learn)) if swa is None else swa_scores(learn, swa, walk)

def run(f, seed):
    "One fit, all arms. `SWA(swa_lr=lr)` changes nothing in a walk at that rate: its last weights are those without SWA"
    swa = train(f, seed, start=.75)
    if f['lr'] is None: return {'without':train(f, seed), 'SWA()':swa}
    held = train(f, seed, swa_lr=f['lr'])
    return {'without':{k:held[k] for k in ('running','last')}, 'SWA()':swa, 'SWA(swa_lr=lr)':held}

def demo(seed, epochs=60, lr=.2):
    "README's example, and SGD with a rate that anneals linearly to a hundredth over the same epochs"
    learn,swa = demo_learner(seed, lr),SWA(swa_lr=lr, check=False)
    with quiet(learn): learn.fit(epochs, cbs=swa)
    sgd = demo_learner(seed, lr)
    with quiet(sgd): sgd.fit(epochs, cbs=ParamScheduler({'lr': sched_authors(lr, lr/100, 1.)}))
    return dict(swa_scores(learn, swa, test=1), annealed=measured(sgd, 1))

# Results, their file, and tables of them

def paired(a, b):
    "a-b: mean and standard error of each measure, and on how many seeds a is lower"
    res = {}
    for m in 'loss','err':
        d = [x[m]-y[m] for x,y in zip(a, b)]
        res[m] = mean(d),stdev(d)/len(d)**.5 if len(d)>1 else 0.,sum(o<0 for o in d)
    return res

def of(res, k, arm, what): return [o[arm][what] for o in res['fits'][k].values()]

def level(rs): return f'{mean(o["loss"] for o in rs):.3f}, {mean(o["err"] for o in rs):.1f}%'

def diff(a, b):
    o = paired(a, b)
    loss,err = (round(o[m][0], n)+0. for m,n in (('loss',3), ('err',1)))     # no -0.0
    return f'{loss:+.3f} ({o["loss"][2]}), {err:+.1f}'

def n_seeds(groups): return '-'.join(str(o) for o in sorted({min(map(len, groups)), max(map(len, groups))}))

def fit_table(res, wrong=None, chosen=True):
    """Differences from the same fit without SWA, statistics measured: test loss (on how many seeds it is lower), test
    error in points. `wrong`: only fits with wrong labels, or with right ones. `chosen`: the best window as well"""
    arms = [('SWA()','mean','`SWA()`'), ('SWA()','last','its last weights'), ('SWA()','chosen','its best window'),
            ('SWA(swa_lr=lr)','mean','`SWA(swa_lr=lr)`'), ('SWA(swa_lr=lr)','chosen','its best window')]
    if not chosen: arms = [o for o in arms if o[1]!='chosen']
    rows = [[f'{n_seeds(res["fits"].values())} seeds', 'without SWA', *(o[2] for o in arms)], ['---']*(len(arms)+2)]
    for k,f in fits.items():
        if k not in res['fits'] or wrong not in (None, f['wrong']): continue
        base,has = of(res, k, 'without', 'last'),next(iter(res['fits'][k].values()))
        name = f'`{k.split(", a fifth")[0]}`'+(', a fifth wrong' if f['wrong'] and wrong is None else '')
        cells = [diff(of(res, k, arm, what), base) if arm in has else '' for arm,what,_ in arms]
        rows.append([name, level(base), *cells])
    return '\n'.join(f'| {" | ".join(o)} |' for o in rows)

def gap_table(res):
    "Accuracies in % that people see: of the last weights as they are, with measured statistics, and of the average"
    head = 'last weights, running statistics | the same, statistics measured | average'
    rows = [f'| {n_seeds(res["fits"].values())} seeds | {head} |', '|---|---:|---:|---:|']
    for k in fits:
        if k not in res['fits']: continue
        accs = [100-mean(o['err'] for o in of(res, k, 'SWA()', w)) for w in ('running','last','mean')]
        rows.append(f'| {k} | '+' | '.join(f'{o:.1f}' for o in accs)+' |')
    return '\n'.join(rows)

def columns(res):
    "What `accuracy` and `swa_accuracy` say of the last epoch, and what measured statistics say of the same weights"
    def line(name, rs):
        seen,swa,last = (100-mean(o[k]['err'] for o in rs) for k in ('running','mean','last'))
        return (f'{name} ({len(rs)} seeds) `accuracy` has {seen:.1f}% beside {swa:.1f}% of `swa_accuracy`, and the '
                f'last weights, statistics measured, have {last:.1f}%.')
    short = [o['SWA()'] for o in res['fits']['fit_one_cycle(2, 1e-2)'].values()]
    parts = {'In the first example':res['demo'].values(), 'After `fit_one_cycle(2, 1e-2)` on the same digits':short}
    return ' '.join(line(k, list(v)) for k,v in parts.items())

def example(res):
    "README's example over the seeds: the average beside what else the same epochs give"
    rs = list(res['demo'].values())
    names = dict(mean='average', last='its last weights, statistics measured',
                 running='its last weights, running statistics', annealed='SGD, annealed to a hundredth')
    rows = [f'| {len(rs)} seeds | test loss | test error | the average is better on |', '|---|---:|---:|---|']
    for k,name in names.items():
        d = paired([o['mean'] for o in rs], [o[k] for o in rs])
        won = '' if k=='mean' else f'{d["loss"][2]} in loss, {d["err"][2]} in error'
        loss,err = (mean(o[k][m] for o in rs) for m in ('loss','err'))
        rows.append(f'| {name} | {loss:.3f} | {err:.1f}% | {won} |')
    return '\n'.join(rows)

def show(res):
    print(fit_table(res), gap_table(res), example(res), sep='\n\n')

def stored(): return json.loads((here/'when.json').read_text())

def dump(res):
    def block(d): return '{\n'+',\n'.join(f'"{s}": {json.dumps(v)}' for s,v in d.items())+'}'
    parts = [f'"{k}": {block(res["fits"][k])}' for k in fits if k in res['fits']]
    return '{"fits": {\n'+',\n'.join(parts)+'},\n"demo": '+block(res['demo'])+'}\n'

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=10, help='of the fits (default 10)')
    p.add_argument('--demo_seeds', type=int, default=24, help="of the README's example (default 24)")
    p.add_argument('--out', type=Path, default=here/'when.json')
    p.add_argument('--show', action='store_true', help='compute nothing')
    o = p.parse_args(args)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    res = json.loads(o.out.read_text()) if o.out.exists() else dict(fits={}, demo={})
    def keep(where, seed, f, *args):
        if str(seed) in where: return
        where[str(seed)] = json.loads(json.dumps(f(*args)), parse_float=lambda v: round(float(v), 5))
        o.out.write_text(dump(res))
        print('.', end='', flush=True)
    if not o.show:
        for i in range(max(o.seeds, o.demo_seeds)):
            if i<o.seeds:
                for k,f in fits.items(): keep(res['fits'].setdefault(k, {}), 500+i, run, f, 500+i)
            for j in range(i*o.demo_seeds//o.seeds, (i+1)*o.demo_seeds//o.seeds):
                if j<o.demo_seeds: keep(res['demo'], 700+j, demo, 700+j)
        print()
    show(res)

if __name__=='__main__': main()
