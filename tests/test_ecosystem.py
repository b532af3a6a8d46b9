"Beside the trackers, loggers and model libraries that people use: the columns of `SWA(eval_every=1)` reach all of them"
import math, re

import pytest, torch
from common import *
from fastswa import utils
from fastswa.callback import SWA

learner = partial(learner, n=50, bs=10, n_valid=70)   # five batches in an epoch, two to validate
names = ['epoch','train_loss','valid_loss','accuracy','swa_loss','swa_accuracy','time']
def from_second(**kw): return SWA(start=1, cycle_len=1, **{'eval_every':1, **kw})   # one snapshot after each epoch but the first

class Script(Callback):
    "Made-up values in columns of the Recorder, one for each epoch; an epoch without evaluation stays without"
    order = Recorder.order+1
    def __init__(self, **cols): self.cols = cols
    def after_epoch(self):
        row,heads = self.learn.recorder.values[-1],list(self.learn.recorder.metric_names[1:])
        for k,v in self.cols.items():
            if not math.isnan(row[heads.index(k)]): row[heads.index(k)] = float(v[self.learn.epoch])

def saved(path, name): return torch.load(path/'models'/f'{name}.pth', weights_only=False)
def assert_mean(m, spy, its, **kw):
    for p,o in zip(m.parameters(), spy.mean(its)): torch.testing.assert_close(p.detach().double(), o, **{'atol':1e-6, 'rtol':1e-6, **kw})
def floats(m): return {k:v for k,v in state(m).items() if v.is_floating_point()}
def loaded(sd):
    m = net(); m.load_state_dict(sd)
    return m

# ---- 1. trackers

@pytest.mark.parametrize('first', ['valid_loss','swa_loss'])
def test_two_savers_each_save_what_they_scored(first, tmp_path):
    l,swa,spy = learner(path=tmp_path),from_second(),Spy()
    savers = [SaveModelCallback(monitor='valid_loss', fname='walk'), SaveModelCallback(monitor='swa_loss', fname='average')]
    fit(l, 5, cbs=[swa, spy, *(savers if first=='valid_loss' else savers[::-1]), Script(valid_loss=[5,4,3,1,2], swa_loss=[9,3,1,2,4])])
    assert same(weights(loaded(saved(tmp_path,'walk'))), spy.ws[19])                 # the walk was best after the fourth epoch, the average after the third
    assert_mean(loaded(saved(tmp_path,'average')), spy, [10,15])
    assert same(saved(tmp_path,'average'), dict(l.model.state_dict())) and swa.n_averaged==2 and swa.collected==[10,15]
    swa.restore(l); assert same(floats(l.model), floats(loaded(saved(tmp_path,'walk'))))   # what the other saver had loaded, its statistics included

@pytest.mark.parametrize('loss,acc', [((9,1,2,3,4), (0,1,2,3,4)), ((9,4,3,2,1), (0,4,3,2,1))])
def test_two_savers_on_the_average(loss, acc, tmp_path):
    "The last one in the list has the last word, as without SWA"
    l,swa,spy = learner(path=tmp_path),from_second(),Spy()
    fit(l, 5, cbs=[swa, spy, SaveModelCallback(monitor='swa_loss', fname='a'), SaveModelCallback(monitor='swa_accuracy', fname='b'), Script(swa_loss=loss, swa_accuracy=acc)])
    its = [10,15,20,25][:int(np.argmax(acc))]
    assert_mean(l.model, spy, its)
    assert_mean(loaded(saved(tmp_path,'a')), spy, [10,15,20,25][:int(np.argmin(loss))])
    assert swa.n_averaged==len(its) and swa.collected==its

@pytest.mark.parametrize('every,have', [(1,[1,2,3,4]), (2,[2,4])])
def test_every_epoch_saves_each_average(every, have, tmp_path):
    "Nothing before there is one"
    l,swa,spy = learner(path=tmp_path),from_second(eval_every=2),Spy()
    fit(l, 5, cbs=[swa, spy, SaveModelCallback(monitor='swa_loss', every_epoch=every)])
    assert sorted(o.stem for o in (tmp_path/'models').iterdir())==[f'model_{k}' for k in have]
    for k in have: assert_mean(loaded(saved(tmp_path,f'model_{k}')), spy, [10,15,20,25][:k])     # with or without an evaluation in that epoch
    assert same(saved(tmp_path,'model_4'), dict(l.model.state_dict())) and swa.n_averaged==4

def test_stopped_early_with_the_best_average(tmp_path):
    l,swa,spy = learner(path=tmp_path),from_second(),Spy()
    fit(l, 9, cbs=[swa, spy, EarlyStoppingCallback(monitor='swa_accuracy', patience=2), SaveModelCallback(monitor='swa_loss'),
                   Script(swa_loss=[9,4,3,5,6]+[0]*4, swa_accuracy=[0,.5,.7,.6,.6]+[1]*4)])
    assert len(l.recorder.values)==5 and swa.n_averaged==2
    assert_mean(l.model, spy, [10,15])

def test_nothing_saved_in_a_fit_cancelled_early(tmp_path):
    "There is an average, and no file to load over it"
    class Stop(Callback):
        order,run_valid = 200,False
        def after_batch(self):
            if self.learn.train_iter==3: raise CancelFitException
    l,swa,spy = learner(path=tmp_path),SWA(start=0, cycle_len=.2, eval_every=1),Spy()
    fit(l, 2, cbs=[swa, spy, Stop(), SaveModelCallback(monitor='swa_loss')])
    assert swa.collected==[1,2,3] and len(spy.ws)==2 and not (tmp_path/'models').exists()
    swa.restore(l); ws = weights(l.model); swa.apply(l)
    for p,a,b,c in zip(l.model.parameters(), *spy.ws, ws): torch.testing.assert_close(p.detach(), (a+b+c)/3, atol=1e-6, rtol=1e-6)

def test_reduce_lr_on_a_plateau_of_the_average():
    "Epochs without a value are neither better nor worse"
    l,spy = learner(),Spy()
    fit(l, 8, cbs=[from_second(swa_lr=False, eval_every=2), spy, ReduceLROnPlateau(monitor='swa_loss', patience=2, factor=10.), Script(swa_loss=[9,3,3,4,4,4,4,4])])
    rates = [o[0] for o in spy.lrs[::5]]          # values after epochs 2, 4, 6, 8: the third is the second without improvement
    np.testing.assert_allclose(rates, [.1]*6+[.01]*2)

# ---- 2. loggers

@pytest.mark.parametrize('k', [1,2,3])
def test_csv_rows(k, tmp_path):
    l = learner(path=tmp_path)
    with l.no_bar(), l.no_logging(): l.fit(5, cbs=[from_second(eval_every=k), CSVLogger()])
    head,*rows = [o.split(',') for o in (tmp_path/'history.csv').read_text().splitlines()]
    assert head==names and [len(o) for o in rows]==[7]*5 and [int(o[0]) for o in rows]==[0,1,2,3,4]
    for row,v in zip(rows,l.recorder.values): np.testing.assert_array_equal([float(o) for o in row[1:-1]], v)
    evaluated = [e for e,o in enumerate(rows) if o[4]!='nan']
    assert evaluated==[e for e in range(1,5) if (e+1)%k==0 or e==4]

def table(text):
    "Header and rows of what the console shows; the bar before each row is overwritten on a screen"
    lines = [o.split('\r')[-1].split() for o in text.splitlines()]
    return [o for o in lines if o and (o[0]=='epoch' or o[0].isdigit())]

def test_console_table(capsys):
    l = learner(); l.fit(3, cbs=from_second())
    head,*rows = table(capsys.readouterr().out)
    assert head==names and [len(o) for o in rows]==[7]*3
    assert rows[0][4:6]==['nan','nan'] and rows[2][4]==f'{l.recorder.values[2][3]:.6f}' and re.match(r'\d\d:\d\d', rows[2][-1])

class Handle:
    "What IPython's `display` returns, and what was shown"
    def __init__(self): self.shown = []
    def update(self, o): self.shown.append(o)

@pytest.fixture
def notebook(monkeypatch):
    "Progress bars as in a notebook, without one"
    import IPython.display
    from fastai.callback import progress
    from fastprogress import fastprogress as fp
    bars,handles = [],[]
    def display(o, display_id=False): handles.append(Handle()); handles[-1].update(o); return handles[-1]
    class Master(fp.NBMasterBar):
        def __init__(self, *args, **kw): super().__init__(*args, **kw); bars.append(self)
    monkeypatch.setattr(IPython.display, 'display', display)
    for m in (progress,utils): monkeypatch.setattr(m, 'progress_bar', fp.NBProgressBar)
    monkeypatch.setattr(progress, 'master_bar', Master)
    return bars,handles

def html_rows(html): return [re.findall(r'<t[hd][^>]*>\s*(.*?)\s*</t[hd]>', o, re.S) for o in re.findall(r'<tr>(.*?)</tr>', html, re.S)]

class Slow:
    "A clock by which everything takes ten seconds"
    now = 0.
    def time(self): self.now += 10; return self.now

@pytest.mark.parametrize('slow', [False,True])
def test_notebook_table_and_graph(slow, notebook, monkeypatch):
    "Also where the refresh takes so long that it shows a bar of its own, below the table"
    from fasthtml.common import to_xml
    if slow: monkeypatch.setattr(utils, 'time', Slow())
    l = learner(); l.fit(3, cbs=[from_second(), ShowGraphCallback()])
    bars,handles = notebook
    assert len(bars)==1 and bars[0].lines[0]==names and [len(o) for o in bars[0].lines]==[7]*4
    shown = [to_xml(o) for h in handles for o in h.shown if type(o).__name__=='FT']
    head,*rows = html_rows([o for o in shown if '<table' in o][-1])
    assert head==names and [len(o) for o in rows]==[7]*3 and rows[0][4]=='nan' and rows[2][4]==f'{l.recorder.values[2][3]:.6f}'
    bars_of_ours = [o for o in shown if 'BatchNorm statistics' in o]
    assert bool(bars_of_ours)==slow and all('<table' in o for o in bars_of_ours)
    train,valid = bars[0].graph_ax.lines
    assert len(train.get_xdata())==15
    np.testing.assert_allclose(valid.get_ydata(), [v[1] for v in l.recorder.values], rtol=1e-6)

def test_without_bars_and_without_words(capsys):
    for bar,words in [(False,True), (True,False), (False,False)]:
        l,rows = learner(),[]
        with contextlib.ExitStack() as st:
            if not bar: st.enter_context(l.no_bar())
            if words: l.logger = rows.append
            else: st.enter_context(l.no_logging())
            l.fit(3, cbs=[from_second(eval_every=2)])
        assert list(l.recorder.metric_names)==names and [len(v) for v in l.recorder.values]==[5]*3
        assert [len(o) for o in rows]==[7]*3*words and 'swa_loss' not in capsys.readouterr().out

@pytest.fixture
def events(tmp_path):
    "Function of callbacks: fit with TensorBoard beside them, and give the learner, and what is in the file by tag"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    def go(*cbs, **kw):
        l = fit(learner(), 3, cbs=[TensorBoardCallback(log_dir=tmp_path, log_preds=False, **kw), *cbs])
        acc = EventAccumulator(str(tmp_path), size_guidance={'scalars':0}).Reload()
        return l,{k:[(o.step,o.value) for o in acc.Scalars(k)] for k in acc.Tags()['scalars']}
    return go

def test_tensorboard_has_the_columns(events):
    l,got = events(from_second(), trace_model=True)
    assert set(got)=={'train_loss','valid_loss','accuracy','swa_loss','swa_accuracy','lr_0','mom_0','wd_0'}
    for i,k in enumerate(names[2:-1]): np.testing.assert_allclose(got[k], [(5*(e+1), v[i+1]) for e,v in enumerate(l.recorder.values)], rtol=1e-6)
    np.testing.assert_allclose([dict(got['lr_0'])[i] for i in range(1,16)], [.1]*5+[.05]*10, rtol=1e-6)

def test_tensorboard_does_not_hear_of_our_own_passes(events):
    _,got = events(from_second(), trace_model=False)
    assert len(got['train_loss'])==3*(5+2)        # five batches of training and two of fastai's own validation in each epoch

@pytest.fixture
def wandb_logs(monkeypatch):
    "What is sent to Weights & Biases, in a run that goes nowhere"
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_SILENT', 'true'); monkeypatch.setenv('WANDB_MODE', 'disabled')
    from fastai.callback import wandb as fw
    from fastcore.basics import init_args
    monkeypatch.setattr(fw, 'init_args', lambda o: init_args(o) if hasattr(o,'__dict__') else {})   # fastcore 2.2.39 takes no numbers here: WandbCallback fails in any fit
    logs,conf = [],{}
    run = wandb.init(mode='disabled')
    monkeypatch.setattr(wandb, 'log', lambda d, **kw: logs.append(d))
    monkeypatch.setattr(type(wandb.config), 'update', lambda self, d, **kw: conf.update(d))
    yield fw.WandbCallback,logs,conf
    run.finish()

@pytest.mark.parametrize('preds', [False,True])
def test_wandb_gets_the_columns(preds, wandb_logs, tmp_path):
    cb,logs,conf = wandb_logs
    swa,l = from_second(eval_every=2),learner(data=image_dls())
    fit(l, 3, cbs=[cb(log_preds=preds, log_preds_every_epoch=preds), swa])
    rows = [o for o in logs if 'valid_loss' in o]
    assert [list(o) for o in rows]==[names[2:-1]]*3
    np.testing.assert_array_equal([list(o.values()) for o in rows], [list(v[1:]) for v in l.recorder.values])
    assert sum('raw_loss' in o for o in logs)==9 and sum('Prediction_Samples' in o for o in logs)==3*preds     # nothing is sent from passes of our own
    mine = [v for k,v in conf.items() if k.startswith('SWA')]
    assert len(mine)==1 and mine[0]['eval_every']==2 and mine[0]['start']==1

def image_dls(n=64, bs=16, size=None, channels=1):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImage, PILImageBW, Resize
    imgs = (X[:n,0]*255).byte().numpy()
    if channels==3: imgs = np.repeat(imgs[...,None], 3, -1)
    seed()
    return DataBlock((ImageBlock(PILImage if channels==3 else PILImageBW), CategoryBlock), get_x=lambda i: imgs[i], get_y=lambda i: int(Y[i]), item_tfms=None if size is None else Resize(size),
                     splitter=IndexSplitter(list(range(n*3//4, n)))).dataloaders(list(range(n)), bs=bs, num_workers=0, drop_last=False)

# ---- 3. other libraries' models

def population(l, layer):
    "Mean and variance of what comes into a layer over the training set, the averaged model in evaluation mode"
    seen = []
    h = layer.register_forward_pre_hook(lambda m,x: seen.append(x[0].detach()))
    try:
        with l.no_bar(): l.get_preds(dl=l.dls.train.new(shuffle=False, drop_last=False))
    finally: h.remove()
    x = torch.cat(seen).transpose(0,1).flatten(1).double()
    return x.mean(1),x.var(1, correction=0)

def check(l, swa, spy, n_epoch, preds=True, tol=1e-6):
    "The mean of the walk, fresh statistics, columns that `validate` repeats"
    assert swa.collected==[k*len(l.dls.train) for k in range(2,n_epoch+1)]
    assert_mean(l.model, spy, swa.collected, atol=tol, rtol=1e-5)
    last = l.recorder.values[-1]
    with quiet(l): got = l.validate()
    np.testing.assert_allclose(got, last[-len(got):], rtol=1e-5)
    assert len(last)==1+2*len(got) and last[1]!=last[-len(got)]               # the average's loss is another one
    bns = [m for m in l.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if bns:
        mean,var = population(l, bns[0])
        torch.testing.assert_close(bns[0].running_mean.double(), mean, atol=1e-5, rtol=1e-4); torch.testing.assert_close(bns[0].running_var.double(), var, atol=1e-5, rtol=1e-4)
        mine = [m.running_var.clone() for m in bns]
        swa.restore(l); assert all(not torch.equal(a,m.running_var) for a,m in zip(mine,bns)); swa.apply(l)     # all layers were refreshed
    if not preds: return
    with quiet(l): p,t = l.get_preds()
    assert p.shape[0]==len(t)==len(l.dls.valid_ds if hasattr(l.dls,'valid_ds') else l.dls.valid.dataset) and p.isfinite().all()
    np.testing.assert_allclose((p.argmax(-1)==t).float().mean(), last[-1], rtol=1e-5)

def test_timm_in_vision_learner(tmp_path):
    pytest.importorskip('timm')
    from fastai.vision.all import vision_learner
    data,swa,spy = image_dls(n=40, bs=10, size=32, channels=3),from_second(),Spy()
    seed(); l = vision_learner(data, 'test_resnet', pretrained=False, metrics=accuracy, path=tmp_path)
    l.unfreeze(); fit(l, 3, 1e-3, cbs=[swa,spy])
    assert len(l.opt.hypers)==2
    check(l, swa, spy, 3)
    with l.no_bar(): probs = l.predict(l.dls.valid_ds[0][0])[2]; want = l.get_preds()[0][0]
    torch.testing.assert_close(probs, want, atol=1e-5, rtol=1e-4)

V,T = 30,6   # words, words in a text
def texts(n=48, bs=12, form='dict'):
    "Texts whose label is whether the first word is a late one; padded at the end"
    seed()
    ids,lens = torch.randint(1, V, (n,T)),torch.randint(3, T+1, (n,))
    mask = (torch.arange(T)<lens[:,None]).long()
    ids,ys = ids*mask,(ids[:,0]>V//2).long()
    one = lambda i: dict(input_ids=ids[i], attention_mask=mask[i], labels=ys[i])
    items = [(one(i),ys[i]) if form=='dict' else (ids[i],mask[i],ys[i]) for i in range(n)]
    data = DataLoaders(FastaiDataLoader(items[:n*3//4], bs=bs, shuffle=True), FastaiDataLoader(items[n*3//4:], bs=bs))
    data.n_inp = 1 if form=='dict' else 2
    return data

class Wrapped(nn.Module):
    "Takes the dict, gives the logits"
    def __init__(self, hf): super().__init__(); self.hf = hf
    def forward(self, b): return self.hf(**{k:v for k,v in b.items() if k!='labels'}).logits
class Whole(Wrapped):
    "Takes the dict with its labels, gives the library's own output, whose loss is the one to use"
    def forward(self, b): return self.hf(**b)
class Logits(Callback):
    "The library's output has logits; the learner wants just these"
    def after_pred(self): self.learn.pred = self.learn.pred.logits

@pytest.fixture
def transformers():
    lib = pytest.importorskip('transformers')
    if not lib.is_torch_available(): pytest.skip(f'transformers {lib.__version__} needs a newer torch than {torch.__version__}')
    return lib

@pytest.mark.parametrize('how', ['wrapped','callback','own loss'])
def test_hugging_face_text(how, transformers):
    seed(); hf = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(vocab_size=V, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=T, num_labels=2))
    model,cbs,loss,met = hf,None,CrossEntropyLossFlat(),accuracy
    if how=='wrapped': model = Wrapped(hf)
    elif how=='callback': cbs = Logits()
    else:
        model,loss = Whole(hf),lambda out,y: out.loss
        def met(out, y): return accuracy(out.logits, y)
    swa,spy = from_second(),Spy()
    l = Learner(texts(form='tuple' if how=='callback' else 'dict'), model, loss_func=loss, metrics=met, cbs=cbs)
    seed(); fit(l, 3, 1e-2, cbs=[swa,spy])
    check(l, swa, spy, 3, preds=how!='own loss')
    m = swa.swa_model; assert not m.training and type(m) is type(model) and same(weights(m), weights(l.model))

def test_hugging_face_pictures_with_batchnorm(transformers):
    seed(); hf = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8,16], depths=[1,1], layer_type='basic', num_labels=10))
    swa,spy = from_second(),Spy()
    l = learner(hf, data=dls(n=80, bs=20, n_valid=40), cbs=Logits(), lr=.05); fit(l, 3, cbs=[swa,spy])
    assert sum(isinstance(m, nn.BatchNorm2d) for m in hf.modules())>=5
    check(l, swa, spy, 3)
