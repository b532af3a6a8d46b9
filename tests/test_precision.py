"Half precision, accumulated and clipped gradients, memory formats, compiled models"
import math, shutil

import fastai.callback.fp16 as fp16
import pytest, torch
from common import *
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastswa.average import WeightAverage
from fastswa.params import unwrap
from fastswa.batchnorm import update_bn
from fastswa.callback import SWA
from fastswa.ensemble import SnapshotEnsemble

def cuda(*marks): return [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'), *marks]
def on_cuda(f):
    for o in cuda(): f = o(f)
    return f

@pytest.fixture(params=['cpu', pytest.param('cuda', marks=cuda())])
def dev(request, monkeypatch):
    "Where mixed precision works: a GPU, or the CPU, to which fastai's own callbacks are turned here"
    if request.param=='cuda': _repeatable(monkeypatch); return 'cuda'
    autocast,scaler,before_fit = torch.autocast,torch.amp.GradScaler,NonNativeMixedPrecision.before_fit
    monkeypatch.setattr(fp16, 'autocast', lambda _, **kw: autocast('cpu', **kw))
    monkeypatch.setattr(fp16, 'GradScaler', lambda _, **kw: scaler('cpu', **kw))
    def unasserted(self):
        data = self.learn.dls
        self.learn.dls = type('OnGPU', (), dict(device=type('Device', (), dict(type='cuda'))))
        try: before_fit(self)
        finally: self.learn.dls = data
    monkeypatch.setattr(NonNativeMixedPrecision, 'before_fit', unasserted)
    return 'cpu'

def _repeatable(monkeypatch):
    for o,k,v in [(torch.backends.cudnn,'deterministic',True), (torch.backends.cudnn,'benchmark',False), (torch.backends.cudnn,'allow_tf32',False)]: monkeypatch.setattr(o, k, v)

@pytest.fixture
def gpu(monkeypatch): _repeatable(monkeypatch)

dtypes = dict(to_fp16=torch.float16, to_bf16=torch.bfloat16)
half = pytest.mark.parametrize('how', list(dtypes))

def on(dev, model=None, **kw):
    "A learner whose model and data are on `dev`"
    l = learner(net(.3) if model is None else model, **kw)
    l.dls.to(torch.device(dev)); l.model.to(dev)
    return l

def each(eval_every=0): return SWA(start=1, cycle_len=1, swa_lr=.1, eval_every=eval_every)     # the learner's own rate: a fit without SWA is the same walk

def depth():
    "How many autocasts are entered"
    torch.autocast_increment_nesting(); return torch.autocast_decrement_nesting()

@pytest.fixture(autouse=True)
def no_autocast_left():
    yield
    left = depth()
    while depth(): torch.autocast_decrement_nesting()       # one failure is enough
    for o in ('cpu','cuda'): torch.set_autocast_enabled(o, False)
    torch.clear_autocast_cache()
    assert left==0

class See(nn.Module):
    "Notes for each pass which kind it is and what `look` says: (training, bn.training) is TT in training, FT in a refresh, FF in an evaluation"
    def __init__(self, bn, look): super().__init__(); self.bn,self.look,self.seen = [bn],look,[]
    def forward(self, x):
        self.seen.append(('FT'[self.training]+'FT'[self.bn[0].training], self.look(x)))
        return x
    def count(self): return {k:sum(o==k for o,_ in self.seen) for k in ('TT','FT','FF')}

def seeing(look, m=None):
    "A model that is watched before its first BatchNorm layer and at its end"
    m = net() if m is None else m
    bn = m[1]
    m.insert(1, See(bn, look)); m.append(See(bn, look))
    return m

def assert_mean(model, spy, its, tol=1e-6):
    for p,m in zip(model.parameters(), spy.mean(its)): torch.testing.assert_close(p.detach().double(), m.double(), atol=tol, rtol=tol)

def moved(spy, first):
    "Iterations in which a step was made"
    return [i+1 for i,(a,b) in enumerate(zip([first,*spy.ws],spy.ws)) if not same(a,b)]

def last(l): return np.array(l.recorder.values[-1], dtype=float)
def validate(l):
    with quiet(l): return np.array(l.validate(), dtype=float)
def assert_repeated(l, rtol=1e-6):
    "`validate` gives the last columns of the average again; they are returned"
    row = last(l)
    np.testing.assert_allclose(validate(l), row[3:], rtol=rtol)      # empties the recorder
    return row
def by_hand(l, dev, dtype=None):
    "Predictions, loss and accuracy of the model as it is, under autocast to `dtype`"
    m = unwrap(l.model).eval()
    with torch.no_grad(), torch.autocast(dev, dtype or torch.bfloat16, enabled=dtype is not None): preds = torch.cat([m(o[0].to(dev)).float() for o in l.dls.valid])
    ys = torch.cat([o[1] for o in l.dls.valid]).to(dev)
    return preds,[nn.functional.cross_entropy(preds, ys).item(),(preds.argmax(1)==ys).float().mean().item()]

# ---- mixed precision

@half
def test_every_pass_has_the_autocast_of_training(dev, how):
    m = seeing(lambda x: (torch.is_autocast_enabled(dev), torch.get_autocast_dtype(dev), x.dtype))
    see,tail = [o for o in m if isinstance(o, See)]
    l,depths = on(dev, m),[]
    class Depth(Callback):
        order = 200
        def after_batch(self): depths.append(depth())
        after_epoch = after_fit = after_batch
    getattr(l,how)(); fit(l, 3, cbs=[each(1), Depth()])
    assert {o for _,o in see.seen}=={(True, dtypes[how], dtypes[how])} and {o[1] for _,o in tail.seen}=={dtypes[how]}
    assert see.count()=={'TT':15, 'FT':10, 'FF':2*3+2*2}          # two refreshes of five batches, two evaluations besides three validations of two
    assert tail.count()=={'TT':15, 'FT':2, 'FF':10}               # each refresh stops after the last layer, from its second batch on
    assert set(depths)=={0} and not torch.is_autocast_enabled(dev) and l.scaler is None

def test_refresh_within_an_autocast_of_the_user(dev):
    l = on(dev).to_bf16(); fit(l, 1)
    l.update_bn(); want = state(l.model)
    other = torch.float16
    with torch.autocast(dev, other, cache_enabled=False):
        l.update_bn()
        assert depth()==1 and torch.is_autocast_enabled(dev) and torch.get_autocast_dtype(dev)==other
    assert depth()==0 and same(state(l.model), want)

@half
def test_columns_are_an_evaluation_under_autocast(dev, how, tmp_path):
    l,swa = on(dev),each(1); getattr(l,how)(); fit(l, 3, cbs=swa)
    cols = last(l)[3:]
    preds,want = by_hand(l, dev, dtypes[how])
    np.testing.assert_allclose(cols, want, rtol=1e-6)
    single = by_hand(l, dev)
    assert not torch.equal(single[0], preds)                      # it makes a difference
    np.testing.assert_allclose(validate(l), cols, rtol=1e-6)      # afterwards too
    got,_ = l.get_preds(ds_idx=1, with_loss=False)
    torch.testing.assert_close(got, preds.softmax(1).cpu(), atol=1e-6, rtol=1e-5)
    now = state(l.model)
    swa.restore(l); assert validate(l)[0]!=cols[0]
    l.to_fp32()
    swa.apply(l); assert same(state(l.model), now) and not hasattr(l, 'mixed_precision')
    np.testing.assert_allclose(validate(l), single[1], rtol=1e-5)
    swa.save(tmp_path/'s'); other = on(dev); SWA().load(tmp_path/'s').apply(other); assert same(state(other.model), {k:v if 'tracked' not in k else state(other.model)[k] for k,v in now.items()})
    swa.restore(l); fit(l, 3, cbs=each()); assert np.isfinite(validate(l)).all()

def test_statistics_are_those_of_autocast(dev):
    l,swa = on(dev).to_bf16(),each(); fit(l, 2, cbs=swa)
    stats = lambda: [o for k,o in state(l.model).items() if 'running' in k]
    got = stats()
    def refreshed(dtype):
        m = unwrap(l.model).train()
        with torch.autocast(dev, dtype, enabled=dtype is not torch.float32): update_bn(m, [X[:200].to(dev)])
        return m[1].running_mean.clone()
    a,b = (refreshed(o) for o in (torch.bfloat16,torch.float32))
    assert (got[0]-a).abs().max()<.2*(a-b).abs().max()

def test_predict(dev):
    ds = Datasets(range(300), [[lambda i: X[i]],[lambda i: Y[i]]], splits=[list(range(80)),list(range(200,240))])
    seed()
    l = Learner(ds.dataloaders(bs=40, device=torch.device(dev)), net().to(dev), loss_func=CrossEntropyLossFlat(), lr=1e-3)
    l.to_fp16(); fit(l, 2, cbs=each())
    with quiet(l): probs = l.predict(250)[2]
    m = l.model.eval()
    with torch.no_grad(), torch.autocast(dev, torch.float16): want = m(X[250:251].to(dev)).float().softmax(1)[0].cpu()
    torch.testing.assert_close(probs.cpu(), want, atol=1e-5, rtol=1e-4)

class Overflow(Callback):
    "Gradients that a GradScaler has to skip"
    order,run_valid = 5,False
    def __init__(self, its): self.its = its
    def before_fit(self): self.i = 0
    def before_step(self):
        self.i += 1
        if self.i in self.its: next(self.learn.model.parameters()).grad.view(-1)[0] = math.inf

class EachScale(Callback):
    order,run_valid = 200,False
    def before_fit(self): self.all = []
    def after_batch(self): self.all.append(self.learn.scaler.get_scale())

@pytest.mark.parametrize('scale,its', [(2.**10, [1,2,7,13,19,20]), (2.**26, [])], ids=['anywhere','at first'])
def test_skipped_steps(dev, scale, its):
    def run(*cbs):
        l = on(dev).to_fp16(init_scale=scale)
        spy,sc,first = Spy(),EachScale(),weights(l.model)
        fit(l, 4, cbs=[spy, sc, Overflow(its), *cbs])
        return l,spy,sc.all,[o for o in range(1,21) if o not in moved(spy, first)]
    swa = SWA(start=0, cycle_len=.2, swa_lr=.1, eval_every=2)              # weights are taken after every iteration
    ref,spy,sc,out = run()
    l,spy2,sc2,out2 = run(swa)
    assert out==out2 and (out==its if its else 2<=len(out)<15 and out[0]==1) and sc[-1]<scale
    assert all(same(a,b) for a,b in zip(spy.ws,spy2.ws)) and sc==sc2
    assert swa.collected==list(range(1,21)) and np.isfinite(last(l)).all()
    assert_mean(l.model, spy2, swa.collected)
    assert_repeated(l)
    swa.restore(l); assert same(state(l.model), state(ref.model))

def test_every_step_is_skipped(dev):
    l,swa = on(dev).to_fp16(init_scale=2.**10),each(1); first = weights(l.model)
    fit(l, 3, cbs=[swa, Overflow(range(99))])
    assert swa.n_averaged==2 and same(weights(l.model), first) and np.isfinite(last(l)[1:]).all()

@pytest.mark.parametrize('how,extra', [('to_fp16',[GradientClip(.05)]), ('to_fp16',[GradientAccumulation(100), GradientClip(.05)]), ('to_bf16',[]), ('to_bf16',[GradientAccumulation(100), MixUp()])])
def test_same_walk(dev, how, extra):
    def run(*cbs):
        l,spy = on(dev),Spy(); getattr(l,how)(**({'init_scale':2.**12} if how=='to_fp16' else {}))
        fit(l, 3, cbs=[spy, *extra, *cbs])
        return l,spy
    swa = SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1)
    (ref,a),(l,b) = run(),run(swa)
    assert len(a.ws)==15 and all(same(x,y) for x,y in zip(a.ws,b.ws)) and swa.n_averaged==5
    assert_mean(l.model, b, swa.collected)
    swa.restore(l); assert same(state(l.model), state(ref.model)) and rng_fingerprint(l)==rng_fingerprint(ref)

class Stop(Callback):
    "Ctrl-C in the third batch of the third epoch"
    def __init__(self, ev, order): self.order = order; setattr(self, ev, self.stop)
    def stop(self):
        if self.learn.training and (self.learn.epoch,self.learn.iter)==(2,2): raise KeyboardInterrupt

def _interrupted(dev, ev, order=200):
    l,swa,spy = on(dev).to_bf16(),each(),Spy()
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[swa, spy, Stop(ev, order)])
    swa.apply(l)
    assert swa.collected==[10] and same(weights(l.model), spy.ws[9])
    return l,state(l.model)

def _left():
    "fastai does not leave the autocast of a batch that is interrupted"
    n = depth()
    while depth(): torch.autocast_decrement_nesting()
    for o in ('cpu','cuda'): torch.set_autocast_enabled(o, False)
    torch.clear_autocast_cache()
    return n

def test_applied_after_an_interrupt(dev):
    l,got = _interrupted(dev, 'after_batch')
    assert depth()==0
    l.update_bn(); assert same(state(l.model), got)                # measured under autocast, then as now


def test_applied_after_an_interrupt_within_a_batch(dev):
    l,got = _interrupted(dev, 'after_pred')
    assert _left()==1
    l.update_bn(); assert same(state(l.model), got)

def test_lent_within_an_autocast(dev):
    m = plain_net().to(dev); avg = WeightAverage(m); avg.update(m)
    x = X[:8].to(dev)
    def out():
        with torch.no_grad(): return m(x)
    with torch.autocast(dev, torch.bfloat16): want = out()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(3)
    with torch.autocast(dev, torch.bfloat16): own = out()
    with torch.autocast(dev, torch.bfloat16):
        a = out()
        with avg.swapped(m): b = out()
        c = out()
    assert torch.equal(a, own) and torch.equal(b, want) and torch.equal(c, own) and not torch.equal(own, want)

@pytest.mark.parametrize('put', ['apply','copy_to'])
def test_put_in_within_an_autocast(dev, put):
    m = plain_net().to(dev); avg = WeightAverage(m); avg.update(m)
    x,now = X[:8].to(dev),lambda: m(x).detach()
    with torch.autocast(dev, torch.bfloat16): want = now()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(3)
    with torch.autocast(dev, torch.bfloat16):
        now(); getattr(avg, put)(m)
        assert torch.equal(now(), want)

# ---- half precision weights with single precision masters

def test_non_native(dev):
    m,swa = seeing(lambda x: x.dtype),SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1)
    def run(model, *cbs):
        l,spy = on(dev, model).to_non_native_fp16(max_loss_scale=2.**24),Spy()
        fit(l, 4, cbs=[spy,*cbs])
        return l,spy
    (ref,a),(l,b) = run(net()),run(m, swa)
    assert sum(same(x,y) for x,y in zip(b.ws,b.ws[1:]))>2           # steps for which the loss scale was too high
    assert all(same(x,y) for x,y in zip(a.ws,b.ws)) and {o.dtype for o in b.ws[0]}=={torch.float16,torch.float32}
    assert {o for _,o in m[1].seen}=={torch.float16} and m[1].count()=={'TT':20, 'FT':15, 'FF':14} and m[-1].count()=={'TT':20, 'FT':3, 'FF':14}
    assert swa.collected==[8,10,12,14,16,18,20] and {p.dtype for p in l.model.parameters()}=={torch.float32}
    assert_mean(l.model, b, swa.collected)
    w = l.model[0].weight
    assert (w!=w.half().float()).float().mean()>.5                  # more than half precision could hold: nothing is lost on the way
    swa.restore(l); assert same(weights(l.model), [o.float() for o in b.ws[-1]]) and same(list(state(l.model).values()), list(state(ref.model).values()))
    swa.apply(l); assert_mean(l.model, b, swa.collected)

def test_non_native_evaluates_and_goes_on(dev, tmp_path):
    l,swa = on(dev).to_non_native_fp16(max_loss_scale=2.**12),each(1)
    fit(l, 3, cbs=swa)
    swa.save(tmp_path/'s'); other = on(dev); SWA().load(tmp_path/'s').apply(other); assert same(weights(other.model), weights(l.model))
    assert_repeated(l)
    l.to_non_native_fp32(); assert np.isfinite(validate(l)).all()
    again = each(1); fit(l, 3, cbs=again); assert again.n_averaged==2 and {p.dtype for p in l.model.parameters()}=={torch.float32}

@pytest.mark.filterwarnings('error:the model was changed')
def test_non_native_keeps_the_average_when_validated(dev):
    l,swa,spy = on(dev).to_non_native_fp16(max_loss_scale=2.**12),each(),Spy()
    fit(l, 3, cbs=[swa,spy]); loss = validate(l)[0]
    swa.restore(l); assert same(weights(l.model), [o.float() for o in spy.ws[-1]])
    assert swa.n_averaged==2 and validate(l)[0]!=loss
    swa.apply(l); assert validate(l)[0]==loss and swa.swa_model is not None

# ---- models whose own weights are half precision

class Inputs(Callback):
    order = 9
    def __init__(self, dtype): self.dtype = dtype
    def before_batch(self): self.learn.xb = tuple(o.to(self.dtype) for o in self.learn.xb)
    def after_pred(self): self.learn.pred = self.learn.pred.float()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_models(dev, dtype):
    seed()
    m = nn.Sequential(nn.Flatten(), nn.Linear(64,4500), nn.BatchNorm1d(4500), nn.ReLU(), nn.Linear(4500,10)).to(dtype)     # more than one scratch buffer holds
    l,spy,swa = on(dev, m, opt_func=SGD, lr=.02, cbs=Inputs(dtype)),Spy(),SWA(start=1, cycle_len=.2, swa_lr=.02, eval_every=2)
    at = [p.data_ptr() for p in m.parameters()]
    fit(l, 3, cbs=[swa,spy])
    assert swa.n_averaged==10 and {o.dtype for o in swa._average.weights.average}=={torch.float32} and {o.dtype for o in weights(m)}=={dtype}
    for p,a,w in zip(m.parameters(), swa._average.weights.average, spy.mean(swa.collected)):
        torch.testing.assert_close(a.double(), w, atol=1e-6, rtol=1e-6)
        assert torch.equal(p, a.to(dtype))
    assert not torch.equal(m[1].weight.float(), swa._average.weights.average[0]) and at==[p.data_ptr() for p in m.parameters()]
    assert_repeated(l)
    swa.restore(l); assert same(weights(m), spy.ws[-1]); swa.apply(l)
    full = swa.copy_to(nn.Sequential(*(type(o)(*a) for o,a in zip(m, [(),(64,4500),(4500,),(),(4500,10)]))).to(dev))
    assert same(weights(full), swa._average.weights.average)                      # nothing rounded where there is room

# ---- gradients accumulated and clipped

@pytest.mark.parametrize('n_acc,cycle_len,steps', [(100,.2,[3,6,9,12,15,18]), (100,1,[3,6,9,12,15,18]), (170,.6,[5,10,15,20]), (1000,.2,[])])
def test_cycles_that_end_between_steps(n_acc, cycle_len, steps):
    def run(*cbs):
        l,spy = learner(net(.3), cbs=[GradientAccumulation(n_acc), GradientClip(.1)]),Spy(); first = weights(l.model)
        fit(l, 4, cbs=[spy,*cbs])
        return l,spy,moved(spy, first)
    swa = SWA(start=1, cycle_len=cycle_len, swa_lr=.1, eval_every=1)
    (ref,a,at),(l,b,at2) = run(),run(swa)
    assert at==at2==steps and all(same(x,y) for x,y in zip(a.ws,b.ws))
    assert swa.n_averaged==round(3/cycle_len) and swa.collected[-1]==20 and set(swa.collected)-set(steps)
    assert_mean(l.model, b, swa.collected)
    if not steps: assert same(weights(l.model), a.ws[0])             # never moved: the mean is what it was, to the bit
    swa.restore(l); assert same(state(l.model), state(ref.model))

# ---- memory format

def is_last(p): return p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()

def wide_net():
    "A layer that is averaged by itself, and one that shares a buffer with other small ones"
    seed()
    return nn.Sequential(nn.Conv2d(1,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,1,1), nn.ReLU(), nn.Conv2d(16,64,3,2,1), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(256,10))

@pytest.mark.parametrize('amp', [False, True])
def test_channels_last(dev, amp):
    look = lambda x: is_last(m[4].weight) and is_last(m[6].weight)
    m = seeing(look, wide_net()); plain = [p.stride() for p in m.parameters()]
    def run(model, *cbs):
        l,spy = on(dev, model).to_channelslast(use_amp=amp, amp_mode='bf16'),Spy(); fit(l, 3, cbs=[spy,*cbs])
        return l,spy
    swa = SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1)
    (ref,a),(l,b) = run(wide_net()),run(m, swa)
    assert l._grab_cbs(ChannelsLast) and len(l._grab_cbs(MixedPrecision))==amp
    assert {o for _,o in m[1].seen}=={True} and set(m[1].count())=={'TT','FT','FF'}      # lent weights have the format too
    assert all(same(x,y) for x,y in zip(a.ws,b.ws)) and swa.n_averaged==5
    strides = [p.stride() for p in l.model.parameters()]
    assert strides!=plain and strides==[o.stride() for o in swa._average.weights.shadow.tensors]==[o.stride() for o in swa._average.weights.average]
    assert_mean(l.model, b, swa.collected); assert_repeated(l)
    got = state(l.model)
    if not amp:
        with torch.no_grad(): x = m[0](X[:200].to(dev)).double().transpose(0,1).flatten(1)
        torch.testing.assert_close(m[2].running_mean.double(), x.mean(1), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(m[2].running_var.double(), x.var(1, correction=0), atol=1e-6, rtol=1e-5)
    swa.restore(l); assert same(list(state(l.model).values()), list(state(ref.model).values())) and is_last(m[4].weight)
    usual = seeing(look, wide_net()).to(dev)                                       # a model of the usual format
    assert same(weights(swa.copy_to(usual)), [got[k] for k in swa._average.weights.names]) and [p.stride() for p in usual.parameters()]==plain
    l.to_contiguous(); swa.apply(l)
    assert same(state(l.model), got) and [p.stride() for p in l.model.parameters()]==plain==[o.stride() for o in swa._average.weights.shadow.tensors]

# ---- compiled models

@pytest.fixture
def fresh():
    torch._dynamo.reset(); yield; torch._dynamo.reset()

class Counter:
    "A backend that counts what it compiles"
    n = 0
    def __call__(self, gm, args): self.n += 1; return gm.forward

# Statistics are measured in eager mode, a stance that torch 2.6 brought: before it a refresh compiles the model once more
can_be_eager = hasattr(torch.compiler, 'set_stance')

def small(): seed(); return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,10))

def compiled(way, backend, m=None, **kw):
    m = small() if m is None else m
    if way=='in place': m.compile(backend=backend, **kw); return m
    if way=='a part': return nn.Sequential(m[0], torch.compile(m[1:], backend=backend, **kw))
    return torch.compile(m, backend=backend, **kw) if way=='wrapped' else m

def addresses(m): return [o.data_ptr() for o in (*m.parameters(),*m.buffers())]

@pytest.mark.parametrize('way', ['wrapped','in place'])
def test_compiled(way, fresh, tmp_path):
    def run(*cbs):
        torch._dynamo.reset()
        count = Counter(); m = compiled(way, count); l,spy = learner(m),Spy()
        fit(l, 4, cbs=[spy,*cbs])
        return l,spy,count
    ref,a,want = run()
    if not want.n: pytest.skip(f'torch {torch.__version__} compiles no Sequential in place')
    swa,at = SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1),[]
    class At(Callback):
        order,run_valid = 200,False
        def after_batch(self): at.append(addresses(unwrap(self.learn.model)))
    l,b,count = run(swa, At())
    assert count.n==want.n>=2 and all(same(x,y) for x,y in zip(a.ws,b.ws))        # training and evaluation are compiled as often as without averaging
    assert swa.n_averaged==7; assert_mean(l.model, b, swa.collected)
    at.append(addresses(unwrap(l.model))); got = state(unwrap(l.model))
    swa.restore(l); assert same(state(l.model), state(ref.model)); at.append(addresses(unwrap(l.model)))
    swa.apply(l);   assert same(state(unwrap(l.model)), got);      at.append(addresses(unwrap(l.model)))
    assert len(at)==23 and all(o==at[0] for o in at)
    loss = validate(l)
    assert count.n==want.n                                                          # still no reason to compile again
    np.testing.assert_allclose(loss, by_hand(l,'cpu')[1], rtol=1e-5)
    names = set(small().state_dict())
    assert set(swa.state_dict()['average'])<=names and set(swa.state_dict()['bn'])=={'1'}
    assert type(swa.swa_model) is nn.Sequential and set(swa.swa_model.state_dict())==names
    swa.save(tmp_path/'s')
    to_plain = learner(small()); SWA().load(tmp_path/'s').apply(to_plain); assert same(state(to_plain.model), {**got, '1.num_batches_tracked': torch.tensor(0)})
    s2 = each(); fit(to_plain, 2, cbs=s2); s2.save(tmp_path/'t')
    SWA().load(tmp_path/'t').apply(l); assert same(weights(unwrap(l.model)), weights(to_plain.model))

def test_a_compiled_part(fresh, tmp_path):
    count,want = Counter(),Counter()
    fit(learner(compiled('a part', want)), 3); torch._dynamo.reset()
    l,swa = learner(compiled('a part', count)),each(1); fit(l, 3, cbs=swa)
    assert want.n>=2 and (count.n==want.n or not can_be_eager)
    assert swa.n_averaged==2 and np.isfinite(last(l)[1:]).all()
    swa.save(tmp_path/'s')
    m = small(); other = learner(nn.Sequential(m[0], m[1:])); SWA().load(tmp_path/'s').apply(other)
    assert same(weights(other.model), weights(l.model))
    old = torch.load(tmp_path/'s')                                                  # version 0.2.0 had the compiler's names in its files
    def named(o): return {(f'1._orig_mod.{k[2:]}'):v for k,v in o.items()}
    old.update(average=named(old['average']), bn=named(old['bn']), layers=list(named(dict.fromkeys(old['layers']))))
    for k in l,other:
        SWA().load(tmp_path/'s').apply(k)
        s = SWA(); s.load_state_dict(old); s.apply(k)
        assert same(weights(k.model), [swa.state_dict()['average'][o] for o in swa._average.weights.names])

def test_an_ensemble_of_a_compiled_part(fresh, tmp_path):
    l,ens = learner(compiled('a part', Counter())),SnapshotEnsemble(2, bn_batches=2); fit(l, 2, cbs=ens)
    with quiet(l): want = ens.validate(l)
    ens.save(tmp_path/'e')
    m = small(); other = learner(nn.Sequential(m[0], m[1:]))
    with quiet(other): np.testing.assert_allclose(SnapshotEnsemble(2).load(tmp_path/'e').validate(other), want, rtol=1e-6)
    l.model.load_state_dict(ens.members[0])                                         # the names are those of its own model

@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='needs a compiler')
def test_compiled_for_real(fresh):
    import torch._inductor.config as config
    from torch._dynamo.exc import BackendCompilerFailed
    with config.patch(compile_threads=1):
        try: fit(learner(torch.compile(small()), n_valid=64), 1)                     # without SWA
        except BackendCompilerFailed as e: pytest.skip(f'torch itself cannot compile here, with {torch.backends.cpu.get_cpu_capability()}: {type(e).__name__}')
    m = small(); l,spy,swa = learner(torch.compile(m), n_valid=64),Spy(),SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1)
    at = addresses(m)
    with config.patch(compile_threads=1):
        fit(l, 3, cbs=[swa,spy])
        assert at==addresses(m) and swa.n_averaged==5; assert_mean(m, spy, swa.collected)
        row = assert_repeated(l, 1e-5)
    np.testing.assert_allclose(row[3], by_hand(l, 'cpu')[1][0], rtol=1e-5)           # what is not compiled computes the same of these weights

# ---- what only a GPU can tell

@on_cuda
@pytest.mark.parametrize('how', ['to_fp16','to_non_native_fp16'])
def test_first_steps_are_skipped_by_the_own_scale(gpu, how):
    "No scale given: fastai's own, which the first gradients overflow"
    swa = SWA(start=0, cycle_len=.2, swa_lr=1e-5, eval_every=1)
    class Steep(nn.Module):
        def forward(self, x): return x*1e3
    l,spy = on('cuda', nn.Sequential(*net(), Steep())),Spy(); first = weights(l.model)
    getattr(l,how)(); fit(l, 6, 1e-5, cbs=[swa,spy])
    at = moved(spy, [o.to(p.dtype) for o,p in zip(first,spy.ws[0])])
    assert at and at[0]>1 and swa.n_averaged==30
    assert_mean(l.model, spy, swa.collected); assert all(o.isfinite().all() for o in weights(l.model))
    assert_repeated(l, 1e-5)

@on_cuda
def test_random_streams_of_the_gpu(gpu):
    def run(*cbs):
        l,spy,rng = on('cuda').to_fp16(),Spy(),[]
        class Streams(Callback):
            order = 1000
            def after_epoch(self): rng.append(torch.cuda.get_rng_state().sum().item())
        torch.cuda.manual_seed_all(1); fit(l, 3, cbs=[spy,Streams(),*cbs])
        return spy,[*rng, torch.cuda.get_rng_state().tolist()]
    class Draws(Callback):
        "A transform that draws on the GPU in every pass, the refresh's included"
        def before_batch(self): self.learn.xb = tuple(o+.1*torch.randn_like(o) for o in self.learn.xb)
    (a,x),(b,y) = run(Draws()),run(Draws(), each(1))
    assert x==y and len(set(x[:-1]))==3 and all(same(v,w) for v,w in zip(a.ws,b.ws))

@on_cuda
@pytest.mark.parametrize('how', [None,'to_fp16','to_non_native_fp16'])
def test_the_average_lives_beside_the_model(gpu, how, tmp_path):
    l,swa = on('cuda'),each(1)
    if how: getattr(l,how)()
    fit(l, 3, cbs=swa)
    assert {o.device.type for o in (*swa._average.weights.average, *swa._average.weights.shadow.tensors, *swa._average.stats.means, *swa._average.stats.vars, *swa.swa_model.parameters())}=={'cuda'}
    swa.save(tmp_path/'s')
    other = on('cuda'); s = SWA().load(tmp_path/'s'); s.apply(other)
    assert same(weights(other.model), weights(l.model)) and {o.device.type for o in s._average.weights.average}=={'cuda'}
    on_cpu = learner(net(.3)); SWA().load(tmp_path/'s').apply(on_cpu)
    assert same(weights(on_cpu.model), [o.cpu() for o in weights(l.model)])

def _wide(): seed(); return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,200000), nn.ReLU(), nn.Linear(200000,10))

@on_cuda
def test_memory_of_the_gpu(gpu):
    import gc
    def run(*cbs):
        l = on('cuda', _wide(), opt_func=SGD, bs=40)
        gc.collect(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(l, 3, cbs=cbs); l.model.zero_grad(set_to_none=True)
        gc.collect(); torch.cuda.synchronize()
        return torch.cuda.memory_allocated()-before,torch.cuda.max_memory_allocated()-before,sum(p.numel()*4 for p in l.model.parameters())
    run()                                                              # workspaces of the libraries
    swa = each(1)
    (end,peak,size),(end2,peak2,_) = run(),run(swa)
    assert swa.n_averaged==2 and .98*size<=end2-end<=1.02*size+2**22, (end2-end)/size      # the allocator may round a tensor up by 1 MB
    assert peak2-peak<=1.02*size+2**22, (peak2-peak)/size

@on_cuda
def test_an_update_allocates_nothing_on_the_gpu(gpu):
    m = _wide().cuda(); before = torch.cuda.memory_allocated(); avg = WeightAverage(m); avg.update(m)
    size,now = sum(p.numel()*4 for p in m.parameters()),torch.cuda.memory_allocated()
    assert now-before<=1.02*size+2**22
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3): avg.update(m)
    with avg.swapped(m): pass
    assert torch.cuda.memory_allocated()==now and torch.cuda.max_memory_allocated()-now<=2**16

@on_cuda
@pytest.mark.skipif(not shutil.which('g++') and not shutil.which('gcc'), reason='needs a compiler')
@pytest.mark.parametrize('how', [None,'to_bf16'])
def test_cuda_graphs(gpu, fresh, how):
    "A recorded graph reads fixed addresses: they are the same before, during and after, whatever is in them"
    tol = 2e-3 if how else 1e-4                                        # compiled kernels round differently from those that evaluate the average
    def run(compile):
        m = small().cuda(); l,spy = on('cuda', m, n_valid=64),Spy()
        if compile: l.model = torch.compile(m, mode='reduce-overhead')
        if how: getattr(l,how)()
        at,swa = addresses(m),SWA(start=1, cycle_len=.4, swa_lr=.1, eval_every=1)
        fit(l, 4, cbs=[swa,spy])
        assert at==addresses(m) and swa.n_averaged==7; assert_mean(m, spy, swa.collected)
        row = last(l)
        for put,want in ((None,row[3]), (swa.restore,row[1]), (swa.apply,row[3])):       # the graph sees the weights that are in place now
            if put: put(l)
            got,plain = validate(l)[0],by_hand(l, 'cuda', torch.bfloat16 if how else None)[1][0]
            np.testing.assert_allclose([got,got], [want,plain], rtol=tol); assert at==addresses(m)
    run(True); run(False)
