"""Do the method's four claims hold? `python benchmarks/claims.py [--seeds N] [--tasks noisy clean ...] [--out FILE]`

Every method on the same seeds, data, first weights and budget, out of the package itself. What each seed gave is
written to `claims.json` beside this file, which nbs/70_tutorial.claims.ipynb makes its tables of. Seeds that are there
already are not computed again: remove the file to recompute everything (half an hour to an hour on one core)."""
import argparse, contextlib, itertools, json, sys, time, warnings
from functools import partial
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))    # this checkout
import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.schedule import ParamScheduler
from fastai.tabular.all import CategoryBlock, Normalize, RegressionBlock, TabularModel, TabularPandas
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastswa.all import *
from fastswa.demo import demo_learner, demo_split

# The tasks: a function of the seed to a learner whose DataLoaders are training, test, and training again as it is, for
# measuring

def digits(seed, clean=False):
    learn = demo_learner(seed)
    if clean: learn.dls.train.dataset.tensors[1].copy_(torch.tensor(load_digits().target)[demo_split(seed)[0]])
    return learn

def table(seed, load, n_train, block, noise=0.):
    """A task of scikit-learn's with columns of numbers: a network of two layers with BatchNorm, as fastai's
    tabular_learner makes it"""
    d = load(as_frame=True)
    df,stratify = d.frame.rename(columns={'target':'y'}),d.target if block is CategoryBlock else None
    train,test = train_test_split(np.arange(len(df)), train_size=n_train, stratify=stratify, random_state=seed)
    if block is CategoryBlock:
        bad = np.random.default_rng(seed).permutation(train)[:round(noise*n_train)]
        df.loc[bad, 'y'] = 1-df.loc[bad, 'y']
    else: df['y'] = (df['y']-df['y'][train].mean())/df['y'][train].std()
    set_seed(seed)
    to = TabularPandas(df, [Normalize], cont_names=[o for o in df if o!='y'], y_names='y', y_block=block(),
                       splits=(list(train),list(test)))
    dls = to.dataloaders(bs=32, val_bs=512, device=torch.device('cpu'))
    dls = DataLoaders(dls.train, dls.valid, dls.train.new(shuffle=False, drop_last=False, bs=512))
    dls.n_inp = 2
    model = TabularModel([], len(to.cont_names), 2 if block is CategoryBlock else 1, [64,64])
    loss = CrossEntropyLossFlat() if block is CategoryBlock else MSELossFlat()
    return Learner(dls, model, loss_func=loss, opt_func=partial(SGD, mom=.9, wd=.05, decouple_wd=False), path=here)

cancer = partial(table, load=load_breast_cancer, n_train=150, block=CategoryBlock, noise=.2)
diabetes = partial(table, load=load_diabetes, n_train=240, block=RegressionBlock)

# Learning rate, weight decay and epochs of the two tables are those with the lowest test loss for SGD, of 9 to 18 tried
# on four other seeds
tasks = dict(noisy    = dict(make=digits, epochs=60, lr=.2, seeds=12, extra=True),
             clean    = dict(make=partial(digits, clean=True), epochs=60, lr=.2, seeds=12),
             cancer   = dict(make=cancer, epochs=30, lr=.02, seeds=20),
             diabetes = dict(make=diabetes, epochs=30, lr=.05, seeds=20))

# What is measured

def quiet(learn): return ContextManagers([learn.no_bar(), learn.no_logging()])

def scores(preds, y):
    """Error in %, loss and, for probabilities, the loss at the temperature that suits them best (chosen on the same
    data, for every method alike)"""
    if preds.shape[-1]==1:
        mse = F.mse_loss(preds.flatten(), y.flatten().float()).item()
        return dict(err=mse**.5, loss=mse, loss_t=mse)
    y,logp = y.flatten().long(),preds.double().clamp_min(1e-30).log()
    def nll(t): return F.cross_entropy(logp/t, y).item()
    err = 100*(preds.argmax(1)!=y).float().mean().item()
    return dict(err=err, loss=nll(1), loss_t=min(nll(t) for t in np.geomspace(.1, 4, 60)))

def measure(learn, predict=None):
    "Scores on the test data, and the loss on the training data"
    predict = predict or learn.get_preds
    with quiet(learn): return dict(scores(*predict(ds_idx=1)), train_loss=scores(*predict(ds_idx=2))['loss'])

class EMA(Callback):
    "torch's own exponential average of the weights, in each step"
    run_valid = False
    def before_fit(self): self.avg = AveragedModel(self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(.98))
    def after_batch(self): self.avg.update_parameters(self.learn.model)

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]

@contextlib.contextmanager
def with_weights(learn, ws):
    "`learn` with other weights, and BatchNorm statistics measured for them; its own afterwards"
    own = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with torch.no_grad():
        for p,w in zip(learn.model.parameters(), ws): p.copy_(w)
    learn.update_bn()
    try: yield learn
    finally: learn.model.load_state_dict(own)

def at(learn, ws):
    with with_weights(learn, ws): return measure(learn)

def mix(a, b, t): return [x+t*(y-x) for x,y in zip(a,b)]

# One seed of one task

class Seed:
    "One seed of a task: learners that begin alike, and the scores of what became of them"
    def __init__(self, make, epochs, lr, seed): store_attr()

    def annealed(self): return ParamScheduler({'lr': sched_authors(self.lr, self.lr/100, 1.)})

    def fit(self, *cbs, n=None):
        learn = self.make(self.seed)
        with quiet(learn): learn.fit(self.epochs if n is None else n, self.lr, cbs=[*cbs])
        return learn

    def sgd(self):
        "The learner with its annealed weights, and scores"
        ema = EMA()
        learn = self.fit(self.annealed(), ema)
        own = weights(learn)
        return learn,{'SGD':measure(learn), 'SGD, fresh BatchNorm':at(learn, own),
                      'SGD, EMA':at(learn, ema.avg.parameters())}

    def swa(self):
        "The average, what was averaged (an `FGE`), and scores of both and of the walk's last weights"
        swa,walk,ema = SWA(swa_lr=self.lr),FGE(bn_batches=None),EMA()
        learn = self.fit(swa, walk, ema)
        mean = weights(learn)
        res = {'SWA(swa_lr=lr)':measure(learn),
               'its points, predictions averaged':measure(learn, partial(walk.get_preds, learn))}
        swa.restore(learn)
        last = weights(learn)
        res['its walk, last weights'] = measure(learn)
        with torch.no_grad():
            for p,w in zip(learn.model.parameters(), mean): p.copy_(w)
        res['SWA(swa_lr=lr), no refresh'] = measure(learn)
        res['its walk, last weights, fresh BatchNorm'] = at(learn, last)
        res['its walk, EMA'] = at(learn, ema.avg.parameters())
        return mean,walk,res

    def others(self):
        "Scores of the default `SWA()`, of the two ensembles, and of the mean of one's members"
        res = {'SWA()':measure(self.fit(SWA()))}
        snap = SnapshotEnsemble(5)
        learn = self.fit(snap)
        for m in 5,3: res[f'snapshots, last {m}'] = measure(learn, partial(snap.get_preds, learn, last=m))
        fge = FGE()
        learn = self.fit(SWA(swa_lr=False, start=0), fge)
        res['FGE'] = dict(measure(learn, partial(fge.get_preds, learn)), cost=fge.n_members)
        res["FGE's points, weights averaged"] = measure(learn)
        return res

    def extra(self):
        "Shorter fits, and one-cycle with Adam"
        res = {}
        for n in 15,30:
            res[f'SGD, {n} epochs'] = measure(self.fit(self.annealed(), n=n))
            res[f'SWA(swa_lr=lr), {n} epochs'] = measure(self.fit(SWA(swa_lr=self.lr), n=n))
        arms = {'one-cycle, Adam':[], 'one-cycle, Adam, SWA()':[SWA()],
                'one-cycle, Adam, SWA(swa_lr=False)':[SWA(swa_lr=False)]}
        for k,cbs in arms.items():
            learn = self.make(self.seed)
            learn.opt_func = partial(Adam, wd=.01)
            with quiet(learn): learn.fit_one_cycle(self.epochs, 1e-2, cbs=cbs)
            res[k] = measure(learn)
        return res

# Claim 2 and 3: where they lie

def mean_of(rs): return {k:float(np.mean([o[k] for o in rs])) for k in rs[0]}

def rim(learn, walk):
    """Scores on the ways from the middle of three points of the walk's tail (on the digits five epochs apart) through
    each of them, which lie at 1"""
    names,gap = [k for k,_ in learn.model.named_parameters()],min(5, (walk.n_members-1)//2)
    points = [[walk.members[-1-i*gap][k] for k in names] for i in (2,1,0)]
    center = [torch.stack(o).mean(0) for o in zip(*points)]
    around = {s:mean_of([at(learn, mix(center, w, s)) for w in points]) for s in (-1.,-.5,.5,1.,1.5)}
    return {0.:at(learn, center), **around}

def width(learn, ends, seed):
    "Error and loss at distances from each of `ends`, mean of three random directions"
    g = torch.Generator().manual_seed(seed)
    rays = [[torch.randn(p.shape, generator=g) for p in learn.model.parameters()] for _ in range(3)]
    rays = [[o/torch.sqrt(sum((x*x).sum() for x in ray)) for o in ray] for ray in rays]
    # each measure has passes of its own, as the stored numbers had: a pass leaves the next one other batches
    def around(ws, r, m): return float(np.mean([at(learn, [w+r*d for w,d in zip(ws,ray)])[m] for ray in rays]))
    return {k:{r:{m:around(ws, r, m) for m in ('err','loss')} for r in (2.,4.,8.)} for k,ws in ends.items()}

def run(make, epochs, lr, seed, extra=False, **_):
    "Scores of every method, and of places around their weights"
    one = Seed(make, epochs, lr, seed)
    sgd,scores_sgd = one.sgd()
    mean,walk,scores_swa = one.swa()
    res,last = {**scores_sgd, **scores_swa, **one.others()},weights(sgd)
    geo = dict(rim=rim(sgd, walk),
               line={t:at(sgd, mix(last, mean, t)) for t in (-.5,-.25,0.,.25,.5,.75,1.,1.25,1.5)},
               width=width(sgd, dict(SGD=last, SWA=mean), seed))
    return dict(scores=res|one.extra() if extra else res, geometry=geo)

def dump(res):
    "The file's text: a line for each seed"
    def block(d): return '{\n'+',\n'.join(f'"{k}": {json.dumps(v)}' for k,v in sorted(d.items()))+'}'
    return '{\n'+',\n'.join(f'"{k}": {block(res[k])}' for k in tasks if k in res)+'}\n'

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, help='how many (default: 12 of the digits, 20 of the tables)')
    p.add_argument('--tasks', nargs='+', default=list(tasks), choices=list(tasks))
    p.add_argument('--out', type=Path, default=here/'claims.json')
    o = p.parse_args(args)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    res = json.loads(o.out.read_text()) if o.out.exists() else {}
    for i,k in itertools.product(range(o.seeds or max(tasks[k]['seeds'] for k in o.tasks)), o.tasks):
        seed = 300+i
        if i>=(o.seeds or tasks[k]['seeds']) or str(seed) in res.get(k, {}): continue
        t0 = time.time()
        new = json.loads(json.dumps(run(seed=seed, **tasks[k])), parse_float=lambda v: round(float(v), 5))
        res.setdefault(k, {})[str(seed)] = new
        o.out.write_text(dump(res))
        a,b = (new['scores'][name] for name in ('SGD','SWA(swa_lr=lr)'))
        print(f"{k} {seed}: error SGD {a['err']:.3f}, SWA {b['err']:.3f}; "
              f"loss {a['loss']:.3f}, {b['loss']:.3f}   ({time.time()-t0:.0f} s)", flush=True)

if __name__=='__main__': main()
