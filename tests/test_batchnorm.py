"Promise 4: statistics of the population, for the layers that trained, with nothing else changed"
import random, time
from copy import deepcopy

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn as torch_update_bn
from common import *
from fastswa.batchnorm import forward_cbs, rng_kept, update_bn

def cnn(): seed(); return nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,5,3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(125,3))
def bns(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
def moments(x): x = x.transpose(0,1).flatten(1).double(); return x.mean(1),x.var(1, unbiased=False)
def assert_is(bn, x, tol=1e-6):
    mean,var = moments(x)
    torch.testing.assert_close(bn.running_mean.double(), mean, atol=tol, rtol=tol)
    torch.testing.assert_close(bn.running_var.double(), var, atol=tol, rtol=tol)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1,40), min_size=1, max_size=8))
def test_first_layer_is_the_populations_for_any_batches(sizes):
    torch.manual_seed(1)
    xs = [torch.randn(n,3)*2+i for i,n in enumerate(sizes)]
    m = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3,2))
    if sum(sizes)==1: return
    update_bn(m, xs)
    assert_is(m[0], torch.cat(xs))     # batches of one sample included, which BatchNorm1d itself cannot take

def test_partial_last_batch_against_torch():
    x = torch.randn(1044,3,8,8); x[-20:] += 5
    batches = list(x.split(256))
    ours,ref = nn.Sequential(nn.BatchNorm2d(3)),nn.Sequential(nn.BatchNorm2d(3))
    update_bn(ours, batches); torch_update_bn(batches, ref)
    assert_is(ours[0], x)
    assert (ref[0].running_mean-moments(x)[0]).abs().max()>.5       # torch gives the last 20 samples the weight of 256

def test_equal_batches_are_torchs():
    """On equal batches the means are torch's. torch's variance is the mean of the batches' unbiased ones, so it lacks what differs between
    the batches and has Bessel's factor: with these two put right, the variances are equal too."""
    x = torch.randn(320,3,9,9)
    batches = list(x.split(32))
    ours,ref = cnn(),cnn()
    inputs = []
    ref[4].register_forward_hook(lambda m,i,o: inputs.append(i[0]))
    torch_update_bn(batches, ref); update_bn(ours, batches)
    means = {1: [ref[0](b).mean((0,2,3)) for b in batches], 4: [b.mean((0,2,3)) for b in inputs[:10]]}
    n = {1: 32*7*7, 4: 32*5*5}
    for k in (1,4):
        torch.testing.assert_close(ours[k].running_mean, ref[k].running_mean, atol=1e-5, rtol=1e-5)
        between = torch.stack(means[k]).detach().var(0, unbiased=False)
        torch.testing.assert_close(ours[k].running_var, ref[k].running_var*(n[k]-1)/n[k]+between, atol=1e-5, rtol=1e-5)

def test_deeper_layers_see_batches_weighted_by_size():
    x = torch.randn(276,3,9,9); x[-20:] += 3
    a,ref = cnn(),cnn()
    update_bn(a, list(x.split(64)))
    update_bn(ref, [x])
    torch_err = cnn(); torch_update_bn(list(x.split(64)), torch_err)
    err = lambda m: (m[4].running_var/ref[4].running_var-1).abs().max().item()
    assert err(a) < err(torch_err)

def test_far_from_zero():
    x = torch.randn(4000,3)+1000
    m = nn.Sequential(nn.BatchNorm1d(3)); update_bn(m, list(x.split(64)))
    torch.testing.assert_close(m[0].running_var.double(), moments(x)[1], rtol=1e-4, atol=0)

def test_no_random_numbers_and_dropout_off():
    x = torch.randn(100,6)
    m = nn.Sequential(nn.Dropout(.5), nn.BatchNorm1d(6))
    before = torch.get_rng_state()
    update_bn(m, list(x.split(10)))
    assert_is(m[1], x)
    assert torch.equal(before, torch.get_rng_state())

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.l = nn.BatchNorm1d(3),nn.BatchNorm1d(2),nn.Linear(5,2)
    def forward(self, x, z): return self.l(torch.cat([self.a(x),self.b(z)],1))
class TakesDict(nn.Module):
    def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(3)
    def forward(self, d): return self.bn(d['x'])

def test_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(X[:100])
    m,want = net(),net()
    update_bn(m, torch.utils.data.DataLoader(Stream(), 20)); update_bn(want, X[:100].split(20))
    for a,b in zip(m.state_dict().values(), want.state_dict().values()): torch.testing.assert_close(a, b)

def test_all_sorts_of_batches():
    x,z,y = torch.randn(30,3),torch.randn(30,2)+1,torch.zeros(30)
    cut = lambda *ts: list(zip(*(t.split(7) for t in ts)))
    for batches in (cut(x,z,y), [list(b) for b in cut(x,z,y)], [dict(x=a,z=b,target=c) for a,b,c in cut(x,z,y)]):
        m = Two(); update_bn(m, batches); assert_is(m.a, x); assert_is(m.b, z)
    for batches in (list(x.split(7)), cut(x), cut(x,y), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x,y), 7)):
        m = nn.Sequential(nn.BatchNorm1d(3)); update_bn(m, batches); assert_is(m[0], x)
    m = TakesDict(); update_bn(m, [dict(x=a) for a in x.split(7)]); assert_is(m.bn, x)
    m = Two(); update_bn(m, cut(y,x,z), call=lambda model,b: model(b[1],b[2])); assert_is(m.a, x)
    m = nn.Sequential(nn.BatchNorm1d(3)); update_bn(m, (b for b in x.split(7))); assert_is(m[0], x)     # no length

@pytest.mark.parametrize('kw', [dict(momentum=None), dict(momentum=0.), dict(affine=False), dict(momentum=.3)])
def test_settings_of_the_layer(kw):
    x = torch.randn(50,3)+2
    m = nn.Sequential(nn.BatchNorm1d(3, **kw)); m(torch.randn(5,3))
    tracked = m[0].num_batches_tracked.clone()
    update_bn(m, list(x.split(8)))
    assert_is(m[0], x)
    assert m[0].momentum==kw.get('momentum', .1) and torch.equal(m[0].num_batches_tracked, tracked)

def test_odd_layers():
    x = torch.randn(50,3)
    m = nn.BatchNorm1d(3); update_bn(m, list(x.split(8))); assert_is(m, x)                              # the root itself
    m = nn.LazyBatchNorm1d(); m(x); update_bn(m, list(x.split(8))); assert_is(m, x)
    m = nn.SyncBatchNorm(3).eval(); update_bn(m, list(x.split(8))) if torch.cuda.is_available() else None
    m = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)); update_bn(m, list(x.split(8)))
    assert m[0].running_mean is None
    m = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.BatchNorm1d(12)); before = m[0].running_mean.clone()
    update_bn(m, [torch.randn(5,3,4)+1]); assert torch.equal(m[0].running_mean, before)                  # not BatchNorm: left alone

def test_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(3)
        def forward(self, x): self.bn(x[:,:3]); return self.bn(x[:,3:])
    x = torch.randn(50,6); x[:,3:] += 2
    m = Twice(); update_bn(m, list(x.split(8)))
    assert_is(m.bn, torch.cat([x[:,:3],x[:,3:]]))

def test_frozen_layers_stay():
    m,x = cnn().train(),torch.randn(40,3,9,9)
    m[1].eval()
    before = m[1].running_mean.clone()
    update_bn(m, list(x.split(8)))
    assert torch.equal(m[1].running_mean, before) and not m[1].training and m[4].training and m[4].running_mean.abs().sum()>0
    m.eval(); update_bn(m, list(x.split(8)))                       # evaluation mode says nothing: all are measured
    assert not torch.equal(m[1].running_mean, before) and not m[4].training

def test_unreachable_layers_warn():
    class Unused(nn.Module):
        def __init__(self): super().__init__(); self.a,self.spare = nn.BatchNorm1d(3),nn.BatchNorm1d(3); self.spare.running_mean.fill_(7)
        def forward(self, x): return self.a(x)
    m = Unused()
    with pytest.warns(UserWarning, match='saw no data.*spare'): update_bn(m, [torch.randn(9,3)])
    assert (m.spare.running_mean==7).all() and m.spare.running_var.eq(1).all()
    with pytest.warns(UserWarning, match='no batch'): update_bn(m, [])
    with pytest.warns(UserWarning, match='TorchScript'):
        update_bn(nn.Sequential(torch.jit.script(nn.BatchNorm1d(3))), [torch.randn(9,3)])
    bad = nn.Sequential(nn.BatchNorm1d(3)); bad[0].running_mean.fill_(7)
    with pytest.warns(UserWarning, match='not finite'): update_bn(bad, [torch.full((9,3), float('nan'))])
    assert (bad[0].running_mean==7).all()

@pytest.mark.parametrize('n', [0,-1]) 
def test_bad_n_batches(n):
    with pytest.raises(ValueError, match='positive number'): update_bn(cnn(), [], n_batches=n)
    with pytest.raises(TypeError, match='positive number'): update_bn(cnn(), [], n_batches=2.5)

def test_n_batches():
    x = torch.randn(60,3); m = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(m, list(x.split(10)), n_batches=4)
    assert_is(m[0], x[:40])

@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['loader','model'])
def test_errors_leave_everything_as_it_was(exc, where):
    m,x = cnn().train(),torch.randn(40,3,9,9)
    m[1].eval(); m(x[:8])
    before,modes = deepcopy(m.state_dict()),[o.training for o in m.modules()]
    calls = []
    def boom(*a):
        calls.append(1)
        if len(calls)==3: raise exc('boom')
    def loader():
        for b in x.split(8): where=='loader' and boom(); yield b
    h = m[3].register_forward_hook(boom) if where=='model' else None
    with pytest.raises(exc): update_bn(m, loader())
    if h: h.remove()
    assert same(dict(m.state_dict()), dict(before)) and [o.training for o in m.modules()]==modes
    assert all(b.momentum==.1 and not b._forward_hooks and not b._forward_pre_hooks for b in bns(m))

def test_stops_after_the_last_layer_but_never_too_early():
    ran = []
    class Tail(nn.Module):
        def forward(self, x): ran.append(1); return x
    x = torch.randn(60,3,9,9)
    m = nn.Sequential(cnn()[:5], Tail())
    update_bn(m, list(x.split(10)))
    assert len(ran)==1                                             # only the first batch goes to the end
    class Loop(nn.Module):                                         # the last layer is used as often as the batch says
        def __init__(self): super().__init__(); self.a,self.b = nn.BatchNorm1d(3),nn.BatchNorm1d(3)
        def forward(self, x):
            x = self.b(x)
            for _ in range(2): self.a(x*2)
            return x
    z = torch.randn(40,3)
    l = Loop(); update_bn(l, list(z.split(10)))
    assert_is(l.b, z)
    class Late(nn.Module):                                         # a layer that only later batches reach
        def __init__(self): super().__init__(); self.a,self.b,self.k = nn.BatchNorm1d(3),nn.BatchNorm1d(3),0
        def forward(self, x):
            self.k += 1
            self.a(x)
            return self.b(x) if self.k>1 else x
    l = Late(); update_bn(l, list(z.split(10)))
    assert_is(l.a, z); assert_is(l.b, z[10:])

def test_no_batchnorm_costs_nothing():
    class Never:
        def __iter__(self): raise AssertionError('the loader must not be touched')
    update_bn(plain_net(), Never())
    l = learner(plain_net()); l.dls.train.dataset = None
    l.update_bn()

def test_half_precision_model():
    x = (torch.randn(50,3)+1).bfloat16()
    m = nn.Sequential(nn.BatchNorm1d(3)).bfloat16(); update_bn(m, list(x.split(8)))
    torch.testing.assert_close(m[0].running_mean.float(), x.float().mean(0), atol=1e-2, rtol=1e-2)

# ---- random streams and loaders

@pytest.mark.parametrize('workers', [0,2])
def test_streams_are_left_as_found(workers):
    l = learner(workers=workers)
    before = rng_fingerprint(l); own = dict(vars(l.dls.train))
    l.update_bn()
    assert rng_fingerprint(l)==before and dict(vars(l.dls.train))==own

def test_torch_loader_generators():
    g = torch.Generator().manual_seed(3)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X,Y), 64, shuffle=True, generator=g)
    before = g.get_state().clone()
    with rng_kept(dl): list(dl); random.random(); np.random.rand(); torch.rand(1)
    assert torch.equal(g.get_state(), before)
    sampler = torch.utils.data.RandomSampler(range(200), generator=g)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:200],Y[:200]), 64, sampler=sampler)
    with rng_kept(dl): list(dl)
    assert torch.equal(g.get_state(), before)

def test_loaders_that_shuffle_in_place():
    from fastai.text.data import LMDataLoader
    dl = LMDataLoader([torch.arange(i, i+9) for i in range(20)], bs=4, seq_len=5, shuffle=True)
    ids,before = dl.items.idxs,list(dl.items.idxs)
    with rng_kept(dl): list(dl); assert list(dl.items.idxs)!=before
    assert dl.items.idxs is ids and list(ids)==before and list(dl.lens.idxs)==before
    class Own(torch.utils.data.Sampler):
        def __init__(self): self.rng,self.k = random.Random(3),0
        def __iter__(self): self.k += 1; return iter(self.rng.sample(range(200), 200))
        def __len__(self): return 200
    for kw in (lambda s: dict(batch_size=64, sampler=s), lambda s: dict(batch_sampler=torch.utils.data.BatchSampler(s, 64, False))):
        s = Own(); dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:200],Y[:200]), **kw(s))
        with rng_kept(dl): first = [b[1] for b in dl]
        assert s.k==0 and all(torch.equal(a,b[1]) for a,b in zip(first,dl))

# ---- learners

class Bright(Callback):
    "A transform of the batch, as a user would write it"
    def before_batch(self): self.learn.xb = (self.learn.xb[0]+1,)

def test_learner_statistics_are_those_of_the_transformed_training_data():
    l = learner(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,10)), cbs=Bright())
    l.update_bn()
    assert_is(l.model[0], X[:200]+1)
    l.update_bn(n_batches=2)
    assert not torch.allclose(l.model[0].running_mean, X[:200].mean()+1, atol=1e-6)

def test_learner_without_a_validation_set():
    l = learner(); l.dls.loaders = l.dls.loaders[:1]; l.update_bn(); assert_is(l.model[1], l.model[0](X[:200]).detach(), 1e-5)

def test_learner_is_unchanged():
    l = learner(cbs=[Bright(), MixUp(), GradientClip()])
    fit(l, 1)
    before,modes,opt = dict(vars(l)),[m.training for m in l.model.modules()],[h.copy() for h in l.opt.hypers]
    l.update_bn()
    assert dict(vars(l))==before and [m.training for m in l.model.modules()]==modes and l.opt.hypers==opt
    l.dls.train.dataset[3] = (X[:2],0)                                # breaks in the middle
    w = state(l.model)
    with pytest.raises(Exception): l.update_bn()
    assert dict(vars(l))==before and [m.training for m in l.model.modules()]==modes and same(state(l.model), w)

def test_learner_frozen_layers():
    l = learner(cbs=BnFreeze())
    for p in l.model[1].parameters(): p.requires_grad_(False)
    w = state(l.model)
    l.update_bn()
    assert torch.equal(l.model[1].running_mean, w['1.running_mean']) and not torch.equal(l.model[4].running_mean, w['4.running_mean'])

def test_which_callbacks_shape_the_forward_pass():
    class Logs(Callback):
        def after_batch(self): raise AssertionError('not to be called')
    class Mine(Callback):
        def after_pred(self): pass
    class TrainOnly(Callback):
        run_valid = False
        def before_batch(self): raise AssertionError('not to be called')
    cbs = [MixUp(), CutMix(), Logs(), Mine(), TrainOnly(), CSVLogger(), SaveModelCallback(), ModelResetter(), RNNCallback(), MixedPrecision(), Callback(before_batch=lambda self: None)]
    l = learner(cbs=cbs)
    assert [type(o).__name__ for o in forward_cbs(l.cbs)]==['CastToTensor','Mine','ModelResetter','RNNCallback','MixedPrecision','Callback']

class AutocastCPU(Callback):
    "MixedPrecision as it would be on a GPU, for a machine without one"
    order = 10
    def before_fit(self): self.ctx = torch.autocast('cpu', torch.bfloat16)
    def before_batch(self): self.ctx.__enter__()
    def after_pred(self): self.learn.pred = self.learn.pred.float()
    def after_loss(self): self.ctx.__exit__(None,None,None)
    def after_fit(self): self.ctx = None

def test_under_autocast():
    seen = []
    class See(nn.Module):
        def forward(self, x): seen.append((torch.is_autocast_enabled('cpu'), x.dtype)); return x
    l = learner(nn.Sequential(nn.Conv2d(1,8,3), See(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288,10)), cbs=AutocastCPU())
    l.update_bn()
    assert set(seen)=={(True, torch.bfloat16)} and not torch.is_autocast_enabled('cpu')
    fit(l, 1); l.update_bn(); assert not torch.is_autocast_enabled('cpu')

def test_mixed_precision_is_left_when_the_pass_stops_early(monkeypatch):
    from fastai.callback import fp16
    depth,seen = [0],[]
    class Counted:
        "Stands for autocast('cuda'), which does nothing on a machine without it"
        def __init__(self, *a, **k): pass
        def __enter__(self): depth[0] += 1
        def __exit__(self, *a): depth[0] -= 1
    monkeypatch.setattr(fp16, 'autocast', Counted)
    class Tail(nn.Module):
        def forward(self, x): seen.append(depth[0]); return x
    l = learner(nn.Sequential(*net(), Tail()), cbs=MixedPrecision(amp_mode='bf16'))
    l.update_bn()
    assert depth==[0] and seen==[1]                                # only the first of five batches went to the end, and autocast was left each time
    fit(l, 2); assert depth==[0]

def test_bar_appears_only_for_long_work(monkeypatch, capsys):
    from fastswa import batchnorm as B
    from fastprogress.fastprogress import master_bar
    t = time.time(); monkeypatch.setattr(B.time, 'time', lambda: t)
    bar = B._Bar(10); bar.update(1); bar.close(); assert bar.bar is None
    monkeypatch.setattr(B.time, 'time', lambda: t+2)
    for parent in (None, master_bar(range(2))):            # the bars of a real console
        bar = B._Bar(10, parent=parent); bar.t0 = t; bar.update(1); bar.update(2); bar.close()
        out = capsys.readouterr().out
        assert parent is not None or '[2/10' in out and 'BatchNorm statistics' in out
    bar = B._Bar(10, show=False); bar.t0 = t; bar.update(1); assert bar.bar is None

def test_bars_of_long_passes_end_to_end(monkeypatch, capsys):
    from fastswa import batchnorm as B
    class Later:                                           # every look at the clock is two seconds after the last
        now = 0.
        def time(self): self.now += 2; return self.now
    monkeypatch.setattr(B, 'time', Later())
    m = nn.Sequential(nn.BatchNorm1d(3)); x = torch.randn(80,3); update_bn(m, list(x.split(8))); assert_is(m[0], x)
    assert 'BatchNorm statistics' in capsys.readouterr().out
    l = learner(); l.update_bn()
    from fastswa.callback import SWA
    l.fit(1, cbs=SWA())

def test_compiled_model_is_measured_without_compiling_again():
    x = torch.randn(40,3,9,9)
    m = cnn(); c = torch.compile(cnn(), backend='eager')
    c(x[:8]); update_bn(m, list(x.split(8)))
    torch._dynamo.reset_code_state() if hasattr(torch._dynamo,'reset_code_state') else None
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    update_bn(c, list(x.split(8)))
    assert torch._dynamo.utils.counters['stats']['unique_graphs']==before
    for a,b in zip(bns(m),bns(c)): torch.testing.assert_close(a.running_mean, b.running_mean); torch.testing.assert_close(a.running_var, b.running_var)

def test_after_validate_too():
    l = learner(cbs=MixedPrecision()); fit(l, 1)
    with quiet(l):
        l.validate()                # leaves its dl behind, as if it were still going on
        l.update_bn()
        assert vars(l).get('_aside') is None

@pytest.mark.parametrize('rng', [np.random.default_rng(3), np.random.RandomState(3)], ids=['Generator','RandomState'])
def test_streams_that_a_sampler_keeps_for_itself(rng):
    class Sampler(torch.utils.data.Sampler):
        def __init__(self): self.rng = rng
        def __iter__(self): return iter(self.rng.permutation(20).tolist())
        def __len__(self): return 20
    dl = torch.utils.data.DataLoader(torch.arange(20), 5, sampler=Sampler())
    with rng_kept(dl): a = torch.cat(list(dl))
    assert torch.equal(torch.cat(list(dl)), a) and not torch.equal(torch.cat(list(dl)), a)
