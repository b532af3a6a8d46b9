"Promise 4: statistics of the population, for the layers that trained, with nothing else changed"
import math, random, signal, sys, time, warnings
from collections import Counter
from copy import deepcopy

import numpy as np, pytest, torch
from fastai.layers import BatchNorm1dFlat
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn as torch_update_bn
from common import *
from fastswa import batchnorm as B, learner as L_, loader as loader_, params, utils
from fastswa.batchnorm import BNStats, update_bn
from fastswa.learner import forward_cbs, is_out_of_memory, isolated_pass, measure_bn, measure_bn_within_memory, pass_bar, run_pass, trained_layers
from fastswa.loader import preserve_rng
from fastswa.callback import SWA

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

def test_channels_last_are_counted_by_channel():
    xs = [torch.randn(4,n,3)*2+n for n in (2,9,5)]                                                        # sequences of unequal lengths
    m = nn.Sequential(BatchNorm1dFlat(3)); update_bn(m, xs)
    assert_is(m[0], torch.cat([x.flatten(0,1) for x in xs]), 1e-5)

def lazy_net(): return nn.Sequential(nn.Conv2d(1,4,3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.Linear(144,10))
def test_lazy_layers():
    for f in (lambda m: update_bn(m, [X[:20]]), lambda m: learner(m).update_bn(), lambda m: update_bn(nn.Sequential(m,nn.Flatten()), [X[:20]])):
        with pytest.raises(ValueError, match=r'1.running_mean has no values yet \(a lazy module\)'): f(lazy_net())
    with pytest.raises(ValueError, match='^running_mean has no values yet'): update_bn(nn.LazyBatchNorm2d(), [X[:20]])
    src = lazy_net(); src(X[:9])
    m = lazy_net(); m.load_state_dict(src.state_dict())                                                   # values, but num_features is 0
    update_bn(m, X[:60].split(20)); assert_is(m[1], m[0](X[:60]).detach(), 1e-5)
    m = lazy_net(); m.load_state_dict(src.state_dict())
    l = learner(m); fit(l, 2, cbs=SWA(start=0)); got = state(m)
    l.update_bn(); torch.testing.assert_close(got, state(m))

class LoRA(nn.Linear):
    "Adds its low-rank part to the weight while it is in evaluation mode, as loralib's layers do. All numbers are such that no sum is rounded"
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.merged = False
        self.weight.data = (self.weight.data*64).round()/64
        self.low = nn.Parameter(torch.arange(n_out*n_in).view(n_out,n_in)%5/8)
    def train(self, mode=True):
        super().train(mode)
        if mode==self.merged:
            self.weight.data += -self.low if mode else self.low
            self.merged = not mode
        return self
    def forward(self, x): return super().forward(x)+(0 if self.merged else x@self.low.T)

@pytest.mark.parametrize('training', [True,False])
def test_layers_that_merge_weights_in_evaluation(training):
    seed()
    m = nn.Sequential(nn.Flatten(), LoRA(64,9), nn.BatchNorm1d(9), LoRA(9,10)).train(training)
    l = learner(m)
    ref = nn.Sequential(m[0], nn.Linear(64,9), nn.BatchNorm1d(9))
    ref[1].weight.data,ref[1].bias.data = m[1].weight.data+(m[1].low.data if training else 0),m[1].bias.data
    update_bn(ref, [X[:200]])
    def look():
        with isolated_pass(l, l.dls.valid) as learn: learn.model.eval(); run_pass(learn)
    w,modes = weights(m),[o.training for o in m.modules()]
    for f in (lambda: update_bn(m, X[:200].split(20)), l.update_bn, look, lambda: trained_layers(l)):
        f()
        assert same(weights(m), w) and [o.training for o in m.modules()]==modes and all(o.merged!=o.training for o in m if isinstance(o, LoRA))
        for k in ('running_mean','running_var'): torch.testing.assert_close(getattr(m[2],k), getattr(ref[2],k), atol=1e-4, rtol=1e-4)

def test_half_an_install_is_impossible():
    m = cnn(); w = state(m)
    with pytest.raises(ValueError, match='another model'): BNStats(bns(m), [torch.ones(4),torch.ones(1)], [torch.ones(4),torch.ones(1)]).install()
    assert same(state(m), w)

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

def spoil(m, mean, var):
    for o in bns(m): o.running_mean[1:].fill_(mean); o.running_var[:2].fill_(var)
    return m

@pytest.mark.parametrize('mean,var', [(math.nan,math.nan), (math.inf,1.), (-math.inf,math.inf), (0.,math.nan)])
@pytest.mark.parametrize('sizes', [(8,8,4), (1,8,1), (1,1)])
def test_statistics_that_are_not_finite_are_repaired(sizes, mean, var):
    "Those that were there do not enter, a first batch of one value per channel included"
    xs = torch.randn(sum(sizes),3).split(sizes)
    def layers(): seed(); return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3,3), nn.BatchNorm1d(3))
    good,bad = layers(),spoil(layers(), mean, var)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        update_bn(good, xs)
        update_bn(bad, xs)
    assert same(state(good), state(bad))

def test_a_learner_repairs_statistics_that_are_not_finite_and_stays_exact():
    good,bad = learner(shuffle=False),learner(shuffle=False)
    spoil(bad.model, math.nan, math.inf)
    with warnings.catch_warnings(), quiet(good), quiet(bad):
        warnings.simplefilter('error')
        good.update_bn()
        bad.update_bn()
    assert same(state(good.model), state(bad.model))
    assert_is(bad.model[1], bad.model[0](X[:200]).detach(), 1e-5)

@pytest.mark.parametrize('value', [7.,math.nan])
def test_statistics_are_back_when_a_refresh_is_interrupted_or_fails(value):
    l = learner()
    for o in bns(l.model): o.running_mean.fill_(value); o.running_var[1:].fill_(value)
    before = state(l.model)
    class Stop(Callback):
        def after_pred(self):
            if self.iter==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), quiet(l), l.added_cbs(Stop()): l.update_bn()
    def batches():
        yield X[:8]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): update_bn(l.model, batches())
    with pytest.warns(UserWarning, match='inputs of 2 BatchNorm layers were not finite'): update_bn(l.model, [X[:8]*math.nan])
    for k,v in state(l.model).items(): assert torch.equal(v.nan_to_num(-5.), before[k].nan_to_num(-5.))

@pytest.mark.parametrize('n', [0,-1]) 
def test_bad_n_batches(n):
    with pytest.raises(ValueError, match='positive number'): update_bn(cnn(), [], n_batches=n)
    with pytest.raises(TypeError, match='positive number'): update_bn(cnn(), [], n_batches=2.5)
    with pytest.raises(ValueError, match='positive number'): learner().update_bn(np.array(n))

@pytest.mark.parametrize('n', [4,np.array(4),torch.tensor(4)])
def test_n_batches(n):
    x = torch.randn(60,3); m = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(m, list(x.split(10)), n_batches=n)
    assert_is(m[0], x[:40])
    l = learner(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,10)), shuffle=False)
    l.update_bn(n); assert_is(l.model[0], X[:160])

def test_wrong_arguments_get_a_sentence():
    class Never:
        def __iter__(self): raise AssertionError('the loader must not be touched')
    l = learner()
    for f,says in {lambda: update_bn(l): r'type learn\.update_bn\(\)$', lambda: update_bn(l, Never()): r'type learn\.update_bn\(dl=dl\)$',
                   lambda: update_bn(l.model, l.dls): r'several, type update_bn\(model, dls\.train\)$', lambda: update_bn(l.model): 'needs the DataLoader of the training data, not NoneType',
                   lambda: update_bn(l.model, 3): 'not int', lambda: update_bn(X, Never()): 'needs a torch model first, not Tensor',
                   lambda: l.update_bn(l.dls.train): r'type learn\.update_bn\(dl=dl\)$', lambda: l.update_bn(dl=l.dls): r'type learn\.update_bn\(dl=dls\.train\)$'}.items():
        with pytest.raises(TypeError, match=says): f()

def test_warnings_point_at_the_users_line():
    l = learner(n=30)                                                                                     # one batch of 40, and drop_last
    for f in (lambda: update_bn(cnn(), []), l.update_bn):
        with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); f()
        assert [o.filename for o in w if 'no batch' in str(o.message)]==[__file__]

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

@pytest.mark.parametrize('event,to_end', [('before_batch',False), ('after_pred',True), ('after_loss',True), ('after_batch',True), (None,True)])
def test_a_pass_goes_to_its_end_where_a_callback_may_count_on_that(event, to_end):
    ran = []
    class Tail(nn.Module):
        def forward(self, x): ran.append(1); return x
    class Any(Callback):
        def before_batch(self): pass
        def __call__(self, event): return super().__call__(event)
    def nothing(self): pass
    l = learner(nn.Sequential(*net(), Tail()), cbs=Any() if event is None else Callback(before_batch=nothing, **({} if event=='before_batch' else {event:nothing})))
    l.update_bn()
    assert len(ran)==(5 if to_end else 1)                          # of five batches

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
    with preserve_rng(dl): list(dl); random.random(); np.random.rand(); torch.rand(1)
    assert torch.equal(g.get_state(), before)
    sampler = torch.utils.data.RandomSampler(range(200), generator=g)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:200],Y[:200]), 64, sampler=sampler)
    with preserve_rng(dl): list(dl)
    assert torch.equal(g.get_state(), before)

def test_loaders_that_shuffle_in_place():
    from fastai.text.data import LMDataLoader
    dl = LMDataLoader([torch.arange(i, i+9) for i in range(20)], bs=4, seq_len=5, shuffle=True)
    ids,before = dl.items.idxs,list(dl.items.idxs)
    with preserve_rng(dl): list(dl); assert list(dl.items.idxs)!=before
    assert dl.items.idxs is ids and list(ids)==before and list(dl.lens.idxs)==before
    class Own(torch.utils.data.Sampler):
        def __init__(self): self.rng,self.k = random.Random(3),0
        def __iter__(self): self.k += 1; return iter(self.rng.sample(range(200), 200))
        def __len__(self): return 200
    for kw in (lambda s: dict(batch_size=64, sampler=s), lambda s: dict(batch_sampler=torch.utils.data.BatchSampler(s, 64, False))):
        s = Own(); dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:200],Y[:200]), **kw(s))
        with preserve_rng(dl): first = [b[1] for b in dl]
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

def test_callbacks_that_are_off_stay_off():
    cb = Bright()
    l = learner(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,10)), cbs=cb)
    cb.run = False
    l.update_bn()
    assert cb.run is False
    assert_is(l.model[0], X[:200])

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
    from fastprogress.fastprogress import master_bar
    t = time.time(); monkeypatch.setattr(utils.time, 'time', lambda: t)
    bar = utils.LateBar(10); bar.update(1); bar.close(); assert bar.bar is None
    monkeypatch.setattr(utils.time, 'time', lambda: t+2)
    for parent in (None, master_bar(range(2))):            # the bars of a real console
        if parent is not None: parent.add_child(first := utils.progress_bar(range(3), parent=parent))
        bar = utils.LateBar(10, parent=parent, comment='statistics'); bar.t0 = t; bar.update(1); bar.update(2); bar.close()
        out = capsys.readouterr().out
        assert '[2/10' in out and 'statistics' in out
        assert parent is None or parent.child is first     # gives the place back
    bar = utils.LateBar(10, show=False); bar.t0 = t; bar.update(1); assert bar.bar is None

def test_bars_of_long_passes_end_to_end(monkeypatch, capsys):
    class Later:                                           # every look at the clock is two seconds after the last
        now = 0.
        def time(self): self.now += 2; return self.now
    monkeypatch.setattr(utils, 'time', Later())
    m = nn.Sequential(nn.BatchNorm1d(3)); x = torch.randn(80,3); update_bn(m, list(x.split(8))); assert_is(m[0], x)
    assert 'BatchNorm statistics' in capsys.readouterr().out
    l = learner(); l.update_bn()
    l.fit(1, cbs=SWA())
    capsys.readouterr()
    with isolated_pass(l, l.dls.valid, bar=pass_bar(l, 3, 'evaluation')) as learn: run_pass(learn)
    out = capsys.readouterr().out
    assert '[1/3' in out and '[2/3' in out and 'evaluation' in out
    with l.no_mbar(): assert not pass_bar(l, 2).show

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
    with preserve_rng(dl): a = torch.cat(list(dl))
    assert torch.equal(torch.cat(list(dl)), a) and not torch.equal(torch.cat(list(dl)), a)

# ---- what others do within the pass

cancels = [CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException]

class Cancels(Bright):
    "Shapes batches, and cancels what it takes for a fit or a validation"
    def __init__(self, event, exc, order=0): self.event,self.exc,self.order = event,exc,order
    def __call__(self, event):
        if event==self.event: raise self.exc('enough')
        return super().__call__(event)

@pytest.mark.filterwarnings('error:.*BatchNorm')
@pytest.mark.parametrize('event', ['before_fit','before_validate','after_validate','after_fit'])
def test_cancels_outside_of_the_batches_are_not_meant_for_a_side_pass(event):
    want = learner(cbs=[Bright(),Bright()]); want.update_bn()
    for exc in cancels:
        l = learner(cbs=[Cancels(event, exc), Bright()])
        before = dict(vars(l))
        l.update_bn()
        assert same(state(l.model), state(want.model)) and dict(vars(l))==before

def test_every_callback_hears_of_the_beginning_and_the_end():
    heard = []
    class Hears(Bright):
        order = 5
        def __call__(self, event): heard.append(event); return super().__call__(event)
    l = learner(cbs=[Cancels('before_validate', CancelFitException), Cancels('after_validate', CancelEpochException), Hears()])
    heard.clear()
    with isolated_pass(l, l.dls.valid) as learn: assert run_pass(learn) is None
    assert heard[:2]+heard[-2:]==['before_fit','before_validate','after_validate','after_fit'] and heard.count('after_batch')==2

def test_a_pass_that_is_cut_short_says_who_did_it():
    for exc in cancels[1:]:
        l = learner(cbs=Cancels('before_batch', exc)); w = state(l.model)
        with pytest.warns(UserWarning, match=f'^Cancels raised {exc.__name__} before the end of the first batch: BatchNorm statistics are left'): l.update_bn()
        assert same(state(l.model), w)
        with isolated_pass(l, l.dls.valid) as learn: assert type(run_pass(learn)) is exc
    l = learner(cbs=Cancels('before_batch', CancelBatchException))
    with pytest.warns(UserWarning, match='2 BatchNorm layers saw no data'): l.update_bn()

class CountedAutocast:
    "Stands for autocast('cuda'), which does nothing on a machine without it"
    depth = 0
    def __init__(self, *a, **k): pass
    def __enter__(self): CountedAutocast.depth += 1
    def __exit__(self, *a): CountedAutocast.depth -= 1

@pytest.mark.parametrize('event,order', [('before_batch',5),('before_batch',20),('after_pred',5),('after_loss',5)])
def test_autocast_is_left_whatever_ends_a_batch(monkeypatch, event, order):
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', CountedAutocast)
    CountedAutocast.depth = 0
    for exc in [*cancels,OSError]:
        l = learner(cbs=[MixedPrecision(amp_mode='bf16'), Cancels(event, exc, order)])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: l.update_bn()
            except OSError: pass
        assert CountedAutocast.depth==0

class Hungry(nn.Module):
    "Has memory for so many items"
    def __init__(self, n, error=torch.OutOfMemoryError): super().__init__(); self.n,self.error,self.sizes = n,error,[]
    def forward(self, x):
        self.sizes.append(len(x))
        if len(x)>self.n: raise self.error('CUDA out of memory. Tried to allocate 2.00 GiB')
        return x
def hungry(n, error=torch.OutOfMemoryError, **kw): return learner(nn.Sequential(Hungry(n, error), *net()), **kw)

def test_what_is_out_of_memory():
    from fastswa.processes import PeerError
    for e in (torch.OutOfMemoryError('x'), MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate'), RuntimeError('CUDA error: out of memory'),
              RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
              RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes'), RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
              RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'), PeerError('process 1 failed with OutOfMemoryError: x, so')):
        assert is_out_of_memory(e), e
    try: torch.empty(2**60)
    except RuntimeError as e: assert is_out_of_memory(e), e
    for e in (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ValueError('out of memory'), KeyboardInterrupt('out of memory')): assert not is_out_of_memory(e)

@pytest.mark.parametrize('error', [torch.OutOfMemoryError,RuntimeError])
def test_smaller_batches_where_the_memory_does_not_suffice(error):
    want = learner(nn.Sequential(nn.Identity(), *net()), bs=10); l = hungry(12, error)
    before,own = rng_fingerprint(l),dict(vars(l.dls.train))
    with pytest.warns(UserWarning, match='out of memory with batches of 40 items: .* batches of 10') as w: l.update_bn()
    assert len([o for o in w if 'memory' in str(o.message)])==1 and l.model[0].sizes==[40,20]+[10]*20
    want.dls.train.rng.setstate(l.dls.train.rng.getstate()); want.update_bn()
    assert same(state(l.model), state(want.model))                 # the same items in the same order
    assert rng_fingerprint(l)==before and dict(vars(l.dls.train))==own and l.model.training
    l.model[0].sizes.clear()
    with pytest.warns(UserWarning, match='out of memory'): l.update_bn(n_batches=2)
    assert sum(l.model[0].sizes[2:])==80                           # as many items as two batches of 40 have

def test_no_memory_at_all():
    l = hungry(3); w,before = state(l.model),dict(vars(l))
    with pytest.raises(torch.OutOfMemoryError, match='2.00 GiB.*not even with batches of 5 items.*learn.update_bn()') as e: l.update_bn()
    assert is_out_of_memory(e.value) and l.model[0].sizes==[40,20,10,5] and same(state(l.model), w) and dict(vars(l))==before
    with pytest.raises(torch.OutOfMemoryError): measure_bn(l, bns(l.model))       # one attempt
    with pytest.raises(OSError): hungry(3, OSError).update_bn()                      # nothing else is tried again
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:80],Y[:80]), 20)
    with pytest.raises(torch.OutOfMemoryError, match='a DataLoader gives batches of one size only: give dl= a loader with smaller batches'): l.update_bn(dl=dl)
    with pytest.raises(TypeError, match='one size only'): measure_bn(l, bns(l.model), dl=dl, bs=5)

def test_autocast_is_left_when_the_memory_does_not_suffice(monkeypatch):
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', CountedAutocast)
    CountedAutocast.depth = 0
    l = hungry(12, cbs=MixedPrecision(amp_mode='bf16'))
    with pytest.warns(UserWarning, match='out of memory'): l.update_bn()
    assert CountedAutocast.depth==0

# ---- what a walk may depend on

class Drawn:
    "A data set that moves its items by random numbers of its own"
    def __init__(self, k, rng): self.k,self.rng = k,rng
    def __len__(self): return 60
    def draw(self):
        if isinstance(self.rng, torch.Generator): return torch.rand(1, generator=self.rng).item()
        return float(self.rng.random() if hasattr(self.rng,'random') else self.rng.rand())
    def __getitem__(self, i): return X[self.k+i]+self.draw(),Y[self.k+i]
class Noise(Bright):
    "A callback with a generator of its own"
    def __init__(self): self.rng = torch.Generator().manual_seed(3)
    def before_batch(self): self.learn.xb = (self.learn.xb[0]+torch.rand(1, generator=self.rng),)
class Around:
    def __init__(self, dataset): self.dataset = dataset
    def __len__(self): return len(self.dataset)
    def __getitem__(self, i): return self.dataset[i]
class Moves(Transform):
    def __init__(self): self.rng = random.Random(3)
    def encodes(self, x:int): return X[x]+self.rng.random()
class Observer(nn.Module):
    "Its buffers move in evaluation too, one in place, one that grows, one that is another tensor each time, one that comes late; and what it has seen matters"
    def __init__(self):
        super().__init__()
        self.register_buffer('top', torch.zeros(1)); self.register_buffer('hist', torch.zeros(1)); self.register_buffer('last', torch.zeros(1)); self.register_buffer('late', None)
        self.register_buffer('wide', torch.zeros(1).expand(3))
    def forward(self, x):
        self.top.lerp_(x.detach().amax(), .1)
        self.hist.resize_(len(self.hist)+1).fill_(self.top.item())
        self.last = self.last+x.detach().mean()
        self.late = self.last if self.late is None else self.late+1
        return x*(1+self.top/10)+self.hist.sum()/100+self.last/10+self.late/100

def loaders(make):
    def drawn(k, rng): return Around(Drawn(k, rng))
    rngs = dict(python=random.Random, numpy=np.random.default_rng, old=np.random.RandomState, torch=lambda s: torch.Generator().manual_seed(s))
    if make in rngs: return DataLoaders(*(FastaiDataLoader(drawn(k, rngs[make](k)), bs=20, shuffle=k==0) for k in (0,60)))
    if make=='loader': return DataLoaders(*(torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([Drawn(k, random.Random(k))]), 20) for k in (0,60)))
    if make=='datasets':
        ds = Datasets(range(120), [[Moves()],[lambda i: Y[i]]], splits=(range(60),range(60,120)))
        return ds.dataloaders(bs=20, num_workers=0)
    return dls(60, 20, 60)

@pytest.mark.parametrize('make', ['python','numpy','old','torch','loader','datasets','observer','callback'])
def test_same_walk_beside_data_sets_and_layers_with_a_state(make):
    res = []
    for kw in (None, dict(eval_every=1)):
        seed()
        spy,l = Spy(),learner(nn.Sequential(Observer(), *net()) if make=='observer' else net(), data=loaders(make))
        fit(l, 3, cbs=[spy, *([Noise()] if make=='callback' else []), *([] if kw is None else [SWA(swa_lr=False, start=0, **kw)])])
        res.append((spy.ws, [row[:2] for row in l.recorder.values], [b for m in l.model for k,b in m.named_buffers() if isinstance(m, Observer)]))
    (a,va,ba),(b,vb,bb) = res
    assert all(map(same, a, b)) and va==vb and same(ba, bb)

def test_buffers_are_put_back():
    m = nn.Sequential(Observer(), *net())
    l = learner(m)
    own,was = dict(m[0].named_buffers()),state(m)
    def look():
        with isolated_pass(l, l.dls.valid) as learn: learn.model.eval(); run_pass(learn)
    for f in (look, l.update_bn, lambda: update_bn(m, X[:60].split(20))):
        f()
        assert {k:id(b) for k,b in m[0].named_buffers()}=={k:id(b) for k,b in own.items()} and m[0].late is None
        assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items() if k.startswith('0.'))
    s = torch.jit.script(net())
    l = learner(s); look(); assert l.validate()

# ---- Ctrl-C

ours = {o.__file__ for o in (B,L_,loader_,params)}
def interrupted(run, at=None):
    "Run it with a Ctrl-C where a line of the module, function and number, is executed for the n-th time; how often each was executed"
    lines,came = Counter(),False
    def line(frame, event, arg):
        if event=='line':
            o = frame.f_code.co_name,frame.f_lineno
            lines[o] += 1
            if at==(o,lines[o]): signal.raise_signal(signal.SIGINT)
        return line
    old = sys.gettrace()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename in ours else None)
    try: run()
    except KeyboardInterrupt: came = True
    finally: sys.settrace(old)
    assert came==(at is not None)
    return lines

def ctrl_c_net(): seed(); return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,3), nn.BatchNorm1d(3), nn.Linear(3,10))
def evaluated(l):
    with BNStats(bns(l.model), [torch.ones(1),torch.ones(3)], [torch.ones(1),torch.ones(3)]).swapped(), isolated_pass(l, l.dls.valid) as learn:
        learn.model.eval()
        run_pass(learn)

@pytest.mark.parametrize('run', [lambda l: update_bn(l.model, l.dls.train), lambda l: l.update_bn(), evaluated], ids=['model','learner','evaluation'])
def test_ctrl_c_at_any_line(run):
    l = learner(ctrl_c_net(), n=8, bs=4, n_valid=4, cbs=[Bright(), BnFreeze()])
    l.model[3].eval()
    def all_else():
        return (dict(vars(l)), list(l.cbs), [cb.learn for cb in l.cbs], rng_fingerprint(l), [dict(vars(o)) for o in l.dls.loaders], [m.training for m in l.model.modules()],
                [(b.momentum,len(b._forward_hooks),len(b._forward_pre_hooks)) for b in bns(l.model)], signal.getsignal(signal.SIGINT))
    before,else_ = state(l.model),all_else()
    lines = interrupted(lambda: run(l))
    after = state(l.model)
    puts_back = {'update_bn','isolated_pass','attached','swapped','install','preserve_rng','preserve_buffers','trained_layers','set_attrs',
                 'preserve_attrs','preserve_modes','measure_bn','_measure','_hooked','_only_cbs','_set_up','_preserve_held','_preserve_global'}
    ats = [(o,n) for o,n in lines.items() if o[0] in puts_back]        # all lines, each time, hold too, and take a minute
    for at in ats+random.Random(1).sample(sorted({*lines.items()}-{*ats}), 5):
        l.model.load_state_dict(before)
        interrupted(lambda: run(l), at)
        assert all_else()==else_, at
        assert same(state(l.model), before) or same(state(l.model), after), at

def test_ctrl_c_comes_at_the_end_of_a_batch():
    l,seen = learner(n=200, bs=20),[]
    class Press(Bright):
        def before_batch(self):
            seen.append(self.iter)
            if self.iter==2: signal.raise_signal(signal.SIGINT)
    l.add_cb(Press())
    with pytest.raises(KeyboardInterrupt): l.update_bn()
    assert seen==[0,1,2]
    def batches():
        for i in range(9): seen.append(i); i==4 and signal.raise_signal(signal.SIGINT); yield X[:20]
    seen.clear()
    with pytest.raises(KeyboardInterrupt): update_bn(l.model, batches())
    assert seen==[0,1,2,3,4]
