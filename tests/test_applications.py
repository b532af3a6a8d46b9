"""Every way to fit, on the learners people have: the average, what predicts with it, and nothing else changed

A cell of `test_matrix` is a kind of learner, a way to fit, an average, and whether that is passed to the fit or attached to the Learner before."""
import pickle
from functools import cache, lru_cache

import pandas as pd, pytest, torch
from common import *
from fastswa.all import *
from fastswa.callback import AverageCallback
from fastswa.schedule import iters_before, swa_cycles

# ---- the data, made once

words = 'the film was great good awful bad boring a fine plot with poor acting and more'.split()
def gray(i, size): return np.kron((X[i,0]*255).byte().numpy(), np.ones((size//8,)*2, dtype=np.uint8))
@cache
def image(i, size=16): return gray(i, size)[...,None].repeat(3, axis=2)
def image32(i): return image(i, 32)
@cache
def mask(i): return (gray(i, 16)>100).astype(np.uint8)
def label(i): return int(Y[i])
def tokens(i): return (X[i,0]*15).long().flatten()[::4]
def top(i): return X[i,:,:4]
def bottom(i): return X[i,:,4:]
def mean_level(i): return float(X[i].mean())

def fresh(dls):
    "The same loaders with random streams of their own, so that runs begin alike"
    for dl in dls.loaders: dl.new()      # the first time it looks at a batch
    seed()
    return type(dls)(*[dl.new() for dl in dls.loaders], path=dls.path, device=dls.device)

def block_dls(*blocks, n=16, n_valid=8, bs=8, **kw):
    from fastai.data.all import DataBlock, IndexSplitter
    return DataBlock(blocks, splitter=IndexSplitter(list(range(n,n+n_valid))), **kw).dataloaders(list(range(n+n_valid)), bs=bs, num_workers=0)

@cache
def small_pictures():
    from fastai.vision.all import Brightness, CategoryBlock, ImageBlock, PILImage
    return block_dls(ImageBlock(PILImage), CategoryBlock(vocab=list(range(10))), get_x=image, get_y=label, batch_tfms=Brightness(p=1))

@cache
def pictures():
    from fastai.vision.all import CategoryBlock, ImageBlock, PILImage, aug_transforms
    return block_dls(ImageBlock(PILImage), CategoryBlock, get_x=image32, get_y=label, n=20, n_valid=10, bs=10, batch_tfms=aug_transforms(do_flip=False))

@cache
def masks():
    from fastai.vision.all import FlipItem, ImageBlock, MaskBlock, PILImage
    return block_dls(ImageBlock(PILImage), MaskBlock(['paper','ink']), get_x=image, get_y=mask, item_tfms=FlipItem())

@cache
def table():
    rng = np.random.RandomState(0)
    return pd.DataFrame(dict(a=rng.randn(120), b=rng.randn(120), c=rng.choice(list('xyz'),120), y=rng.choice(['no','yes'],120)))

@cache
def table_dls():
    from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders
    return TabularDataLoaders.from_df(table(), procs=[Categorify,FillMissing,Normalize], cat_names=['c'], cont_names=['a','b'], y_names='y',
                                      y_block=CategoryBlock(), valid_idx=list(range(90,120)), bs=45)

@cache
def ratings():
    from fastai.collab import CollabDataLoaders
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(user=rng.randint(0,8,80), title=rng.choice(list('abcdef'),80), rating=rng.randint(1,6,80)))
    return CollabDataLoaders.from_df(df, valid_pct=.25, seed=1, bs=30, item_name='title')

@cache
def texts(is_lm, n, length, bs, seq_len):
    from fastai.text.all import BaseTokenizer, TextDataLoaders
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(words, length)) for _ in range(n)], label=rng.choice(['neg','pos'],n)))
    return TextDataLoaders.from_df(df, text_col='text', label_col='label', is_lm=is_lm, valid_pct=.25, bs=bs, seed=1, seq_len=seq_len, num_workers=0, tok_tfm=BaseTokenizer())

@cache
def sequences():
    from fastai.data.all import CategoryBlock, TransformBlock
    return block_dls(TransformBlock, CategoryBlock(vocab=list(range(10))), get_x=tokens, get_y=label)

@cache
def digits():
    from fastai.data.all import CategoryBlock, TransformBlock
    return block_dls(TransformBlock, CategoryBlock(vocab=list(range(10))), get_x=X.__getitem__, get_y=label)

@cache
def pairs():
    from fastai.data.all import CategoryBlock, RegressionBlock, TransformBlock
    return block_dls(TransformBlock, TransformBlock, CategoryBlock(vocab=list(range(10))), RegressionBlock, n_inp=2,
                     getters=[top, bottom, label, mean_level])

# ---- the learners: each is made from a path and arguments of Learner, and comes with an item to predict (None: this data has no `predict`)

kw0 = dict(metrics=accuracy, lr=.01)

def vision(path, **kw):
    from fastai.vision.all import resnet18, vision_learner
    return vision_learner(fresh(pictures()), resnet18, pretrained=False, path=path, **{**kw0, 'lr':1e-3, **kw}),0

def small_arch(pretrained=False):
    return nn.Sequential(ConvLayer(3,4), ConvLayer(4,4,stride=2), ConvLayer(4,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))

def small_vision(path, **kw):
    from fastai.vision.all import vision_learner
    return vision_learner(fresh(small_pictures()), small_arch, pretrained=False, lin_ftrs=[8], path=path, **{**kw0,**kw}),0

def smaller_arch(pretrained=False): return nn.Sequential(ConvLayer(3,4), ConvLayer(4,4,stride=2), ConvLayer(4,4), nn.AdaptiveAvgPool2d(1))
def pixel_accuracy(p, y): return (p.argmax(1)==y[:,0] if y.ndim==4 else p.argmax(1)==y).float().mean()
def unet(path, **kw):
    from fastai.vision.all import unet_learner
    return unet_learner(fresh(masks()), smaller_arch, pretrained=False, n_out=2, path=path, **{**kw0, 'metrics':pixel_accuracy, **kw}),0

def tabular(path, **kw):
    from fastai.tabular.all import tabular_learner
    return tabular_learner(fresh(table_dls()), layers=[20,10], n_out=2, path=path, **{**kw0,**kw}),table().iloc[0]

def distance(p, y): return (p-y).abs().mean()
def collab(path, **kw):
    from fastai.collab import collab_learner
    return collab_learner(fresh(ratings()), n_factors=4, y_range=(0,5.5), path=path, **{**kw0, 'metrics':distance, **kw}),pd.DataFrame(dict(user=[1,2], title=['a','b']))
def collab_nn(path, **kw): return collab(path, use_nn=True, layers=[8], **kw)

def language(path, **kw):
    from fastai.text.all import AWD_LSTM, awd_lstm_lm_config, language_model_learner
    cfg = {**awd_lstm_lm_config, 'emb_sz':8, 'n_hid':10, 'n_layers':2}
    return language_model_learner(fresh(texts(True, 16, 8, 4, 16)), AWD_LSTM, config=cfg, pretrained=False, path=path, **{**kw0,**kw}),'a good film'

def text(path, **kw):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner
    cfg = {**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':10, 'n_layers':1}
    return text_classifier_learner(fresh(texts(False, 24, 8, 8, 16)), AWD_LSTM, config=cfg, pretrained=False, path=path, **{**kw0,**kw}),'a good film with a fine plot'

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.pos,self.head = nn.Embedding(16,8),nn.Parameter(torch.randn(16,8)/3),nn.Linear(8,10)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    def forward(self, x): return self.head(self.encoder(self.emb(x)+self.pos).mean(1))
def transformer(path, **kw): return Learner(fresh(sequences()), Transformer(), path=path, **{**kw0,**kw}),0

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = (nn.Sequential(nn.Flatten(), nn.Linear(32,6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(.2)) for _ in range(2))
        self.cat,self.num = nn.Linear(12,10),nn.Linear(12,1)
    def forward(self, x, z):
        h = torch.cat([self.a(x), self.b(z)], 1)
        return self.cat(h),self.num(h)
class SumOfTwo:
    def __call__(self, o, y, t): return nn.functional.cross_entropy(o[0], y)+(o[1][:,0]-t).pow(2).mean()
    def activation(self, o): return o[0].softmax(1),o[1]
    def decodes(self, o): return o[0].argmax(1),o[1]
def first_accuracy(o, y, t): return accuracy(o[0], y)
def multi(path, **kw): return Learner(fresh(pairs()), TwoHeads(), loss_func=SumOfTwo(), path=path, **{**kw0, 'metrics':first_accuracy, **kw}),0

class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8,10))
    def forward(self, b): return {'logits':self.body(b['x'])*b['scale'][:,None]}
def dict_loss(o, y): return nn.functional.cross_entropy(o['logits'], y['y'])
def dict_accuracy(o, y): return accuracy(o['logits'], y['y'])
def dicts(path, **kw):
    items = [({'x':X[i],'scale':X[i].max()},{'y':Y[i]}) for i in range(24)]
    dls = DataLoaders(FastaiDataLoader(items[:16], bs=8, shuffle=True), FastaiDataLoader(items[16:], bs=8))
    return Learner(dls, DictNet(), loss_func=dict_loss, path=path, **{**kw0, 'metrics':dict_accuracy, **kw}),None

def torch_loaders(path, **kw):
    tr,va = (torch.utils.data.TensorDataset(X[s],Y[s]) for s in (slice(40),slice(40,60)))
    dls = DataLoaders(torch.utils.data.DataLoader(tr, 20, shuffle=True), torch.utils.data.DataLoader(va, 20))
    return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), path=path, **{**kw0,**kw}),None

def no_bn(path, **kw): return Learner(fresh(digits()), plain_net(), path=path, **{**kw0,**kw}),0

makers = dict(vision=small_vision, unet=unet, tabular=tabular, collab=collab, collab_nn=collab_nn, language=language, text=text, transformer=transformer,
              multi=multi, dicts=dicts, torch_loaders=torch_loaders, no_bn=no_bn, resnet18=vision)

# ---- what is observed

def checksum(o):
    if isinstance(o, dict): o = list(o.values())
    if isinstance(o, (tuple,list)): return sum(map(checksum, o))
    return o.as_subclass(torch.Tensor).sum(dtype=torch.float64).item() if isinstance(o, torch.Tensor) else 0.
def hypers(learn): return tuple((float(h['lr']),float(h['mom'])) for h in learn.opt.hypers)
def row(rec): return [v for n,v in zip(rec.metric_names[1:], rec.values[-1]) if n!='time' and not n.startswith(('swa_','ema_'))]

class Witness(Callback):
    "What another callback sees: every event, and the learner in it. With the last word it also sees rows of the table and random streams"
    def __init__(self, order, seen): self.order,self.seen = order,seen
    def __call__(self, event):
        l,has = self.learn,vars(self.learn).get
        if event=='before_fit': self.mods = list(l.model.modules())
        sums = [checksum(has(k)) for k in ('xb','yb','pred','loss')] if not event.endswith(('backward','step')) else None     # nothing is new there
        self.seen.append((self.order, event, l.training, [m.training for m in self.mods], hypers(l), sums, has('dl') is l.dls.train,
                          *(has(k) for k in ('epoch','n_epoch','train_iter','pct_train','iter','n_iter'))))
        if self.order>=1000 and event=='after_epoch': self.seen.append((row(l.recorder), l.recorder.losses[-1].item(), rng_fingerprint(l)))

def steps(seen, event):
    "Learning rates and momenta of each training iteration, at the end of an event"
    return tuple(o[4] for o in seen if o[:3]==(1000,event,True))

class Watch(Spy):
    "Also how many snapshots each fit ends with, and whether with the weights of its last step"
    def __init__(self): self.ends = []
    def after_fit(self): self.ends.append((sum(cb.n_averaged for cb in self.learn._grab_cbs(AverageCallback)), same(weights(self.learn.model), self.ws[-1])))

class Replay(Callback):
    "Sets the learning rates and momenta of another run, as late as SWA sets them; `first` as early as a schedule does"
    order,run_valid = 56,False
    def __init__(self, steps, begin=0, first=()): self.steps,self.begin,self.first,self.k = steps,begin,first,0
    def put(self, hs):
        for i,o in enumerate(('lr','mom')): self.learn.opt.set_hyper(o, [h[i] for h in hs])
    def before_batch(self):
        if self.first: self.put(self.first[self.k])
    def after_pred(self):
        if self.k>=self.begin: self.put(self.steps[self.k])
        self.k += 1

# ---- the matrix

methods = dict(fit=(3,), fit_one_cycle=(3,), fit_flat_cos=(3,), fit_sgdr=(2,1), fine_tune=(3,), fit_swa=(3,))     # three epochs each (sgdr: 1+2)
when = dict(start=.5, eval_every=1)
averages = dict(swa=lambda: SWA(**when), ema=lambda: EMA(.5, **when))

def run(kind, method, path, how, replay=None, average='swa'):
    "What a fit leaves behind, without an average where there is something to replay; the same random numbers each time"
    seed()
    swa = averages[average]() if how=='attached' or method!='fit_swa' and replay is None else None
    learn,item = makers[kind](path, cbs=swa if how=='attached' else None)
    learn.model.train()                  # tabular models share a ReLU, whose mode is that of the last one used
    seen,watch = [],Watch()
    cbs = [Witness(0, seen), Witness(1000, seen), watch, *L(replay)] + ([swa] if how=='passed' and swa else [])
    with quiet(learn): res = getattr(learn, method)(*methods[method], cbs=cbs, **(when if method=='fit_swa' else {}))
    return learn,item,swa or res,watch,seen

@lru_cache(1)        # passed or attached, the rates ought to be the same
def without_swa(kind, method, step, begin, first=()):
    learn,_,_,_,seen = run(kind, method, '.', None, Replay(step, begin, first))
    return seen,state(learn.model)

def predict(learn, item):
    "What people would look at; a row of ratings, for which fastai has no `predict`, goes through `test_dl`"
    seed()
    if isinstance(item, pd.DataFrame): return learn.get_preds(dl=learn.dls.test_dl(item))[0]
    res = learn.predict(item)
    return res if isinstance(res, str) else res[2]

class Outputs(Callback):
    "What the model gives for the batches of a loader: `get_preds` does not gather dicts"
    def __init__(self): self.all = []
    def after_pred(self): self.all.append(self.learn.pred)
def outputs(learn, dl):
    cb = Outputs()
    learn.validate(dl=dl, cbs=cb)
    return cb.all
def close(a, b):
    if isinstance(a, torch.Tensor): return torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    if isinstance(a, dict): a,b = list(a.values()),list(b.values())
    return a==b if isinstance(a, str) else len(a)==len(b)>0 and all(map(close, a, b))

def reloaded(learn, file):
    "From a file. fastai does not export torch's DataLoaders nor a list's, their model goes alone"
    if not hasattr(learn.dls.train_ds, 'new_empty'): return Learner(learn.dls, pickle.loads(pickle.dumps(learn.model)), loss_func=learn.loss_func)
    learn.export(file)
    return load_learner(file)

kinds = [o for o in makers if o!='resnet18']
cells = [*((k,m,h,'swa') for k in kinds for m in methods for h in ('passed','attached')), ('resnet18','fit','passed','swa'),     # one real network
         *((k,m,'passed','ema') for k in kinds for m in methods if m!='fit_swa'), *((k,'fine_tune','attached','ema') for k in kinds)]

def mean_of(average, watch, n_iter):
    "By hand, in float64: the average of the last fit, the iterations in it, and how many of these `collected` tells of"
    if average=='swa':
        its = list(swa_cycles(3, n_iter, when['start']).ends)
        return watch.mean(its),its,its
    begin,total = iters_before(when['start'], 3, n_iter),3*n_iter
    its,decay = range(begin+1, total+1),.5**(1/(.5*(total-begin)))
    mean = [w.double() for w in watch.ws[begin]]
    for k,i in enumerate(its[1:], 2): mean = [m+max(1-decay, 1/k)*(w.double()-m) for m,w in zip(mean, watch.ws[i-1])]
    return mean,its,[its[0],its[-1]]

@pytest.mark.filterwarnings('ignore:load_learner')
@pytest.mark.parametrize('kind,method,how,average', cells, ids=map('-'.join, cells))
def test_matrix(kind, method, how, average, tmp_path):
    if (method,how)==('fit_swa','attached'): return refused(kind, tmp_path)
    learn,item,swa,watch,seen = run(kind, method, tmp_path, how, average=average)
    last,names = learn.recorder.values[-1],list(learn.recorder.metric_names[1:])
    with quiet(learn): again = learn.validate()
    # the average is the mean of what was collected, in the last fit alone, where the rates are held
    cyc = swa_cycles(3, len(learn.dls.train), when['start'])
    mean,its,told = mean_of(average, watch, cyc.n_iter)
    assert swa.collected==told and len(its)>=3 and swa.collected[0]<=2*cyc.n_iter      # an evaluation comes in between
    for p,m in zip(learn.model.parameters(), mean, strict=True): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)
    assert watch.ends==[(0,True)]*(method=='fine_tune')+[(len(its),False)]
    hs = steps(seen, 'after_pred')
    before = len(hs)-len(watch.ws)                                                                     # iterations of the frozen fit
    hs,held = np.array(hs[before:]),np.array(hs[before+cyc.begin:])
    if average=='swa':
        assert (held==held[0]).all()
        np.testing.assert_allclose(held[0,:,0], hs[:cyc.begin,:,0].max(0)/2)
    # validate repeats the last columns
    cols = [i for i,n in enumerate(names) if n.startswith(average+'_')]
    assert len(cols)==1+len(learn.metrics)
    np.testing.assert_allclose(again, [last[i] for i in cols], rtol=1e-5)
    # without SWA, at the same rates, others see the same
    step,first = steps(seen, 'after_pred'),steps(seen, 'before_batch')
    if method=='fit_swa': seen2,walked = without_swa(kind, 'fit', step, 0, first)
    else: seen2,walked = without_swa(kind, method, step, before+cyc.begin)
    assert next(((a,b) for a,b in zip(seen,seen2) if a!=b), None) is None and len(seen)==len(seen2)
    # what predicts is the average, in memory and in a file; the walk is that without SWA
    with quiet(learn):
        def answers(l): return outputs(l, learn.dls.valid),'' if item is None else predict(l, item)
        average,its = answers(learn),state(learn.model)
        with quiet(reloaded(learn, tmp_path/'learner.pkl')) as other: assert close(answers(other), average)
        swa.restore(learn)
        assert same(state(learn.model), walked) and not close(outputs(learn, learn.dls.valid), average[0])
        swa.apply(learn)
        assert same(state(learn.model), its)

def refused(kind, path):
    "`fit_swa` brings an SWA of its own"
    learn,_ = makers[kind](path, cbs=SWA())
    before = state(learn.model)
    with quiet(learn):
        cbs = list(learn.cbs)
        with pytest.raises(ValueError, match=r'two SWA callbacks, and only one average can end up in the model: remove one \(learn.remove_cb\)'):
            learn.fit_swa(3)
        assert same(state(learn.model), before) and set(learn.cbs)==set(cbs)

@pytest.mark.parametrize('kind', kinds)
def test_nothing_to_warn_of(kind, tmp_path):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        run(kind, 'fit', tmp_path, 'passed')
    assert [str(w.message) for w in ws if Path(w.filename).parent.name=='fastswa']==[]
