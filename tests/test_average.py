"Promises 3, 8 and 10 of the running mean: exact, in place, one copy, safe against interrupts and changed models"
import copy, gc, math, signal, sys, threading, warnings, weakref

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fastswa import average, params, tensors, utils
from fastswa.average import WeightAverage, all_finite
from fastswa.params import unwrap

torch.manual_seed(0)
def walk(m, sd=.1):
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*sd)

def cnn(): return nn.Sequential(nn.Conv2d(3,64,3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64*36,10))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.out = nn.Embedding(11,6),nn.Linear(6,11,bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb(x))

class Odd(nn.Module):
    "Complex, double, transposed, empty and scalar parameters; integer parameter and buffers"
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.d = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.t = nn.Parameter(torch.randn(80,90).t())
        self.e = nn.Parameter(torch.zeros(0,3))
        self.s = nn.Parameter(torch.tensor(2.))
        self.i = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer('steps', torch.tensor(7))

def parametrized():
    m = nn.Sequential(nn.Linear(4,5), nn.Linear(5,3))
    nn.utils.parametrizations.weight_norm(m[0]); nn.utils.parametrizations.spectral_norm(m[1])
    return m

def half(): return cnn().bfloat16()
def frozen():
    m = cnn()
    m[0].requires_grad_(False)
    return m
def channels_last(): return cnn().to(memory_format=torch.channels_last)
def tiny(): return nn.Sequential(*[nn.LayerNorm(8) for _ in range(50)])
kinds = [cnn, Tied, Odd, parametrized, half, frozen, channels_last, tiny]

def exact(snaps): return [torch.stack([s[i] for s in snaps]).mean(0) for i in range(len(snaps[0]))]
def snap(m): return [p.detach().clone().to(torch.complex128 if p.is_complex() else torch.float64) for p in m.parameters() if p.dtype!=torch.int64]

@pytest.mark.parametrize('make', kinds)
def test_equals_float64_mean(make):
    m = make()
    avg,snaps = WeightAverage(m),[]
    for _ in range(12):
        walk(m); avg.update(m); snaps.append(snap(m))
    assert avg.n==12 and isinstance(avg.n, int)
    for a,e in zip(avg.average, exact(snaps)): torch.testing.assert_close(a.to(e.dtype), e, atol=1e-6, rtol=1e-6)

def test_equals_AveragedModel():
    m = cnn()
    avg,ref = WeightAverage(m),AveragedModel(m)
    for _ in range(10): walk(m); avg.update(m); ref.update_parameters(m)
    for a,r in zip(avg.average, ref.module.parameters()): torch.testing.assert_close(a, r.detach(), atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_rms_error_of_100_snapshots(dtype):
    m = nn.ParameterList([nn.Parameter(torch.ones(n, dtype=dtype)) for n in (50,5000)])
    avg,total,start = WeightAverage(m),[torch.zeros(n, dtype=torch.float64) for n in (50,5000)],[torch.randn(n) for n in (50,5000)]
    for _ in range(100):   # as at the end of a training: a place, and steps around it
        with torch.no_grad():
            for p,t,o in zip(m,total,start): p.copy_(o+.1*torch.randn_like(o)); t.add_(p.double())
        avg.update(m)
    a,e = torch.cat([o.double() for o in avg.average]),torch.cat(total)/100
    assert (a-e).pow(2).mean().sqrt()/e.pow(2).mean().sqrt() <= 3*2**-24

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_weights_stay_bit_identical(dtype):
    m = nn.Sequential(cnn(), nn.Linear(100,100)).to(dtype)      # large and tiny tensors take different ways
    m.requires_grad_(False); m[0][4].requires_grad_(True)
    before = [p.detach().clone() for p in m.parameters()]
    avg = WeightAverage(m)
    for _ in range(37): walk(m); avg.update(m)
    avg.apply(m)
    assert [torch.equal(p,b) for p,b in zip(m.parameters(),before)]==[not p.requires_grad for p in m.parameters()]

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1,9000), min_size=1, max_size=6), st.integers(1,9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_sizes(sizes, n, dtype):
    m = nn.ParameterList([nn.Parameter(torch.randn(s).to(dtype)) for s in sizes])
    avg,snaps = WeightAverage(m),[]
    for _ in range(n): walk(m); avg.update(m); snaps.append(snap(m))
    for a,e in zip(avg.average, exact(snaps)): torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('make', kinds)
def test_swap_apply_restore(make):
    m = make()
    avg = WeightAverage(m)
    for _ in range(3): walk(m); avg.update(m)
    walk(m)
    own,ids,ptrs = [p.detach().clone() for p in m.parameters()],[id(p) for p in m.parameters()],[p.data_ptr() for p in m.parameters()]
    mean = [a.clone() for a in avg.average]
    def now(): return [p for p in m.parameters() if p.dtype!=torch.int64]
    def is_mean(): return all(torch.equal(p, a.to(p.dtype)) for p,a in zip(now(),mean))
    def is_own():  return all(torch.equal(p,o) for p,o in zip(m.parameters(),own))
    with avg.swapped(m): assert is_mean()
    assert is_own() and [p.data_ptr() for p in m.parameters()]==ptrs
    with pytest.raises(KeyboardInterrupt):
        with avg.swapped(m): raise KeyboardInterrupt
    assert is_own()
    for _ in range(2):
        avg.apply(m); avg.apply(m)
        assert is_mean() and all(torch.equal(a,b) for a,b in zip(avg.average,mean))
        assert all(torch.equal(avg.state_dict()['average'][k],b) for k,b in zip(avg.names,mean))
        avg.restore(m); avg.restore(m)
        assert is_own() and all(torch.equal(a,b) for a,b in zip(avg.average,mean))
    assert [id(p) for p in m.parameters()]==ids and [p.data_ptr() for p in m.parameters()]==ptrs

def test_tied_stays_tied():
    m = Tied()
    avg = WeightAverage(m)
    assert len(avg.names)==1
    avg.update(m); walk(m); avg.update(m)
    with avg.swapped(m): assert m.out.weight is m.emb.weight
    avg.apply(m)
    assert m.out.weight is m.emb.weight

def test_tied_by_memory():
    m = nn.Sequential(nn.Linear(4,4,bias=False), nn.Linear(4,4,bias=False))
    m[1].weight.data = m[0].weight.data
    avg = WeightAverage(m); avg.update(m); walk(m); avg.update(m); walk(m)
    own,mean = m[0].weight.detach().clone(),avg.average[0].clone()
    for _ in range(2):
        avg.apply(m);   assert torch.equal(m[1].weight, mean)
        avg.restore(m); assert torch.equal(m[1].weight, own)

def test_one_copy_of_the_weights():
    m = cnn()
    size = sum(p.numel()*p.element_size() for p in m.parameters())
    def tensors(): # bytes in distinct storages
        gc.collect()
        sts = {o.untyped_storage().data_ptr():o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)}
        return sum(sts.values())
    base = tensors()
    avg = WeightAverage(m)
    for _ in range(3): avg.update(m)
    assert tensors()-base <= size+2**20
    with avg.swapped(m): assert tensors()-base <= size+2**20
    avg.apply(m)
    assert tensors()-base <= size+2**20

@pytest.mark.parametrize('make', [cnn, half, tiny])
def test_update_allocates_nothing(make):
    m = make()
    avg = WeightAverage(m)
    avg.update(m); avg.update(m)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: avg.update(m)
    assert max((e.cpu_memory_usage for e in prof.events()), default=0) <= 64

def test_count_is_not_a_tensor_and_old_model_is_not_deepcopied():
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo): raise RuntimeError('no copies')
    m = NoCopy(3,3)
    avg = WeightAverage(m); avg.update(m); avg.apply(m); avg.restore(m)

def test_moves_with_the_model():
    "A change of type or memory format after the average was made"
    m = cnn()
    avg,snaps = WeightAverage(m),[]
    for f in (lambda o: o, lambda o: o.to(memory_format=torch.channels_last), lambda o: o.double(), lambda o: o.bfloat16(), lambda o: o.float()):
        f(m); walk(m); avg.update(m); snaps.append(snap(m))
    for a,e in zip(avg.average, exact(snaps)): torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)

def test_pointer_replaced_by_somebody_else():
    m = cnn()
    avg = WeightAverage(m); avg.update(m)
    first = [a.clone() for a in avg.average]
    for p in m.parameters(): p.data = torch.full_like(p, 5.)
    avg.update(m)
    for a,f in zip(avg.average,first): torch.testing.assert_close(a, (f+5)/2)

@pytest.mark.parametrize('change', [lambda m: m.__setitem__(4, nn.Linear(64*36,10)), lambda m: m.append(nn.Linear(10,10)),
    lambda m: m[4].register_parameter('bias', None), lambda m: setattr(m[0], 'weight', nn.Parameter(m[0].weight.detach().clone())),
    lambda m: nn.utils.parametrizations.weight_norm(m[4])])
def test_refuses_a_changed_model(change):
    m = cnn()
    avg = WeightAverage(m); avg.update(m)
    change(m)
    with pytest.raises(ValueError, match='replaced'): avg.update(m)
    assert avg.n==1

def test_other_models():
    m,same,other = cnn(),cnn(),Tied()
    avg = WeightAverage(m); avg.update(m); avg.update(same)
    torch.testing.assert_close(avg.average[0], (m[0].weight+same[0].weight).detach()/2)
    with pytest.raises(ValueError, match='architecture'): avg.update(other)
    with pytest.raises(ValueError, match='architecture'): avg.copy_to(other)
    with pytest.raises(ValueError, match='copy_to'): avg.apply(same)
    avg.copy_to(same)
    assert torch.equal(same[0].weight, avg.average[0])

@pytest.mark.parametrize('own', ['float32','bfloat16','float64','last'])
@pytest.mark.parametrize('theirs', ['float32','float16','float64','last'])
def test_another_model_of_another_type_or_memory_format(own, theirs):
    def make(how):
        m = nn.Sequential(nn.Conv2d(3,8,3), nn.Linear(9,7), nn.Conv2d(8,80,3), nn.Linear(99,99))     # small and large ones
        return m.to(memory_format=torch.channels_last) if how=='last' else m.to(getattr(torch, how))
    m,other,mask = make(own),make(theirs),torch.full((3,3), -math.inf).triu(1)
    for o in (m,other): o.mask = nn.Parameter(mask.to(o[0].weight.dtype), requires_grad=False)
    avg = WeightAverage(m); avg.update(m); avg.update(other); avg.update(other)
    want = exact([snap(m),snap(other),snap(other)])
    for a,e in zip(avg.average,want): torch.testing.assert_close(a.nan_to_num(neginf=0).double(), e.nan_to_num(neginf=0), atol=1e-6, rtol=1e-6)
    assert torch.equal(avg.average[0].float(), mask)
    first = WeightAverage(m); first.update(other)
    assert all(torch.equal(a, p.to(a.dtype)) for a,p in zip(first.average,other.parameters()))

def test_half_precision_weights_that_are_slices_or_empty():
    m = nn.ParameterList([nn.Parameter(torch.randn(10,10).bfloat16()[:,::2]), nn.Parameter(torch.zeros(0,3).half()), nn.Parameter(torch.randn(3).half())])
    avg,snaps = WeightAverage(m),[]
    for _ in range(4): walk(m); avg.update(m); snaps.append(snap(m))
    for a,e in zip(avg.average, exact(snaps)): torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)
    avg.apply(m); assert avg.is_applied()
    avg.restore(m); assert all(map(torch.equal, snap(m), snaps[-1]))

def test_wrapped_models():
    m = cnn()
    avg = WeightAverage(nn.DataParallel(m)); avg.update(torch.compile(m))
    assert avg.n==1 and avg.names[0]=='0.weight' and unwrap(torch.compile(nn.DataParallel(m))) is m

def test_nothing_yet_and_wrong_moment():
    m = cnn()
    avg = WeightAverage(m)
    for f in (avg.apply, avg.copy_to):
        with pytest.raises(RuntimeError, match='nothing has been averaged'): f(m)
    avg.update(m); avg.apply(m)
    with pytest.raises(RuntimeError, match='restore'): avg.update(m)

def test_trained_on_while_applied_is_noticed():
    m = cnn()
    avg = WeightAverage(m); avg.update(m); walk(m)
    own = m[0].weight.detach().clone()
    avg.apply(m)
    m[0].weight.data.add_(1e-3)   # as fastai's optimizers step: no version counter tells
    for f in (lambda: avg.average, avg.state_dict, lambda: avg.apply(m)):
        with pytest.raises(RuntimeError, match='the mean is gone'): f()
    with pytest.warns(UserWarning, match='the mean is gone'): avg.restore(m, force=True)
    assert torch.equal(m[0].weight, own) and avg.n==0

def test_state_dict_goes_on(tmp_path):
    m = cnn(); m2 = copy.deepcopy(m)
    a,b = WeightAverage(m),WeightAverage(m2)
    for i in range(6):
        walk(m); a.update(m)
        if i==2:
            torch.save(a.state_dict(), tmp_path/'a.pt')
            b.load_state_dict(torch.load(tmp_path/'a.pt', weights_only=True))
        if i>2:
            m2.load_state_dict(m.state_dict()); b.update(m2)
    assert a.n==b.n==6 and all(torch.equal(x,y) for x,y in zip(a.average,b.average))
    with pytest.raises(ValueError, match='another architecture'): WeightAverage(Tied()).load_state_dict(a.state_dict())

def test_finite():
    t = torch.ones(10)
    assert all_finite([t, t.half(), t.bfloat16(), torch.zeros(0), t.to(torch.complex64), torch.full((3,), 1e300, dtype=torch.float64)])
    assert all_finite([torch.full((n,), 3e38) for n in (10,9000)])                   # though their sum is not
    assert all_finite([torch.full((n,), 6e4, dtype=torch.float16) for n in (10,9000)])
    for bad in (float('inf'), -float('inf'), float('nan')):
        for n in (10,10000):
            t = torch.ones(n); t[3] = bad
            assert not all_finite([torch.ones(2), t]) and not all_finite([t.half()]) and not all_finite([torch.ones(9000), t.double(), torch.ones(3)])

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_finding_out_allocates_nothing(dtype):
    t = torch.ones(10**6, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: assert all_finite([t])
    assert max((e.cpu_memory_usage for e in prof.events()), default=0) <= 64

def test_old_style_weight_norm_and_no_reference_kept():
    m = nn.utils.weight_norm(nn.Linear(3,3)); m(torch.randn(2,3))   # deepcopy fails on this one
    avg = WeightAverage(m); avg.update(m); walk(m); avg.update(m)
    x = torch.randn(2,3)
    with avg.swapped(m): y = m(x)
    avg.apply(m)
    assert torch.equal(m(x), y)
    r = weakref.ref(m); del m,avg; gc.collect()
    assert r() is None

@pytest.mark.parametrize('what', ['apply','restore','swapped'])
def test_interrupted_in_the_middle_of_an_exchange(what, monkeypatch):
    "Ctrl-C while tensors are changing hands: all of them are on one side afterwards"
    m = cnn()
    avg = WeightAverage(m); avg.update(m); walk(m)
    own,mean = [p.detach().clone() for p in m.parameters()],[a.clone() for a in avg.average]
    if what=='restore': avg.apply(m)
    calls,dense,at = [],tensors._is_dense,2 if what!='swapped' else len(own)+2     # in swapped: on the way back
    def ctrl_c(t):
        calls.append(1)
        if len(calls)==at: signal.raise_signal(signal.SIGINT)
        return dense(t)
    monkeypatch.setattr(tensors, '_is_dense', ctrl_c)
    if what=='swapped':
        data = torch.Tensor.data
        def set_data(self, v): ctrl_c(v); data.__set__(self, v)
        monkeypatch.setattr(nn.Parameter, 'data', property(data.__get__, set_data), raising=False)
    with pytest.raises(KeyboardInterrupt):
        if what=='swapped':
            with avg.swapped(m): pass
        else: getattr(avg, what)(m)
    monkeypatch.undo()
    want = mean if what=='apply' else own
    assert all(torch.equal(p,w) for p,w in zip(m.parameters(),want)) and avg.applied==(what=='apply') and len(calls)>2
    assert all(torch.equal(a,w) for a,w in zip(avg.average,mean))

def test_other_threads_need_no_signals():
    m = cnn(); avg = WeightAverage(m); avg.update(m); walk(m); res = []
    t = threading.Thread(target=lambda: (avg.apply(m), res.append(avg.applied))); t.start(); t.join()
    assert res==[True]

# --- modules that rearrange their weights in eval() ---

class LoRA(nn.Linear):
    "Merges its factors into the frozen weight in `eval()`, in place, and takes them out in `train()`"
    def __init__(self, n_in=6, n_out=5, rank=2):
        super().__init__(n_in, n_out)
        self.a,self.b,self.merged = nn.Parameter(torch.randn(rank,n_in)),nn.Parameter(torch.randn(n_out,rank)),False
        self.weight.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        if self.merged==mode: self.weight.data += (-1 if mode else 1)*(self.b@self.a).data; self.merged = not mode
        return self
    def forward(self, x): return super().forward(x) + (0 if self.merged else x@self.a.T@self.b.T)

class Rebinding(nn.Module):
    "The same around a layer, with a new tensor for each merge"
    def __init__(self):
        super().__init__()
        self.base,self.a,self.b,self.merged = nn.Linear(6,5),nn.Parameter(torch.randn(2,6)),nn.Parameter(torch.randn(5,2)),False
        self.base.weight.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        if self.merged==mode: self.base.weight.data = self.base.weight.data + (-1 if mode else 1)*(self.b@self.a).data; self.merged = not mode
        return self
    def forward(self, x): return self.base(x) + (0 if self.merged else x@self.a.T@self.b.T)

class KeepsStats(nn.Sequential):
    "Its BatchNorm stays in evaluation mode, as in detection networks"
    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d): m.eval()
        return self

def merging(layer, root): return root(layer(), nn.BatchNorm1d(5), nn.Dropout(.1)).train()
mergers = [(layer,root) for layer in (LoRA,Rebinding) for root in (nn.Sequential,KeepsStats)]
def modes(m): return [o.training for o in m.modules()]
def near(a, b): return all(torch.allclose(x, y, atol=2e-6, rtol=1e-6) for x,y in zip(a,b))

@pytest.mark.parametrize('layer,root', mergers)
def test_merged_weights_are_averaged_and_exchanged_unmerged(layer, root):
    m,other,x = merging(layer, root),merging(layer, root),torch.randn(7,6)
    W = next(p for p in m.parameters() if not p.requires_grad).detach().clone()
    avg,snaps = WeightAverage(m),[]
    for i in range(6):
        m.train(); walk(m)
        snaps.append([p.detach().clone() for p in m.parameters()])
        m.train(i%2==0)
        was = modes(m)
        avg.update(m)
        assert modes(m)==was
    mean = [torch.stack(s).double().mean(0).float() for s in zip(*snaps)]
    assert near(avg.average, mean)
    ref = merging(layer, root).eval()
    with torch.no_grad():
        ref.train()
        for p,a in zip(ref.parameters(),mean): p.copy_(a)
        want = ref.eval()(x)
    m.train(); walk(m)
    own = [p.detach().clone() for p in m.parameters()]
    for training in (True,False):
        m.train(training); was = modes(m)
        with torch.no_grad(), avg.swapped(m):
            for _ in range(3): assert torch.allclose(m.eval()(x), want, atol=1e-5); m.train()
            m.train(training)
        assert modes(m)==was
        with torch.no_grad(), avg.swapped(m.eval()): assert torch.allclose(m(x), want, atol=1e-5)
        m.train(); assert near(m.parameters(), own) and near(avg.average, mean)
        m.train(training)
        avg.apply(m)
        assert modes(m)==was and avg.is_applied()
        with torch.no_grad(): assert torch.allclose(m.eval()(x), want, atol=1e-5)
        for _ in range(5):
            m.eval(); assert avg.is_applied() and near(avg.average, mean) and near(avg.state_dict()['average'].values(), mean)
            m.train(); assert avg.is_applied() and near(m.parameters(), mean)
        other.eval(); avg.copy_to(other); assert near(other.train().parameters(), mean)
        m.train(training); avg.restore(m)
        assert modes(m)==was and near(m.train().parameters(), own) and near(avg.average, mean)
    assert torch.allclose(W, next(p for p in m.parameters() if not p.requires_grad), atol=2e-6)
    n = avg.n
    avg.update(other.eval())
    assert near(avg.average, mean) and avg.n==n+1
    avg.apply(m.eval()); m.train(); walk(m); m.eval()           # training of such a model is noticed as that of any
    assert not avg.is_applied()
    with pytest.raises(RuntimeError, match='force=True'): avg.restore(m)

def test_modes_of_a_model_that_keeps_its_statistics():
    "A `train` of its own is no reason for rounding, or for other modes"
    m = KeepsStats(nn.Linear(6,5), nn.BatchNorm1d(5), nn.Sequential(nn.Dropout(), nn.Linear(5,5)))
    m[2][0].eval()
    avg = WeightAverage(m); avg.update(m); walk(m); avg.update(m); walk(m)
    own,mean = snap(m),[a.double() for a in avg.average]
    for mode in (None,False):
        if mode is not None: m.train(mode)
        was = modes(m)
        with avg.swapped(m): assert modes(m)==was and all(map(torch.equal, snap(m), mean))
        avg.apply(m);   assert modes(m)==was and all(map(torch.equal, snap(m), mean)) and avg.is_applied()
        avg.restore(m); assert modes(m)==was and all(map(torch.equal, snap(m), own))

def test_a_merging_layer_that_comes_later_is_found():
    m = nn.Sequential(nn.Linear(6,5))
    avg = WeightAverage(m); avg.update(m)
    frozen = m[0].weight.detach().clone()
    new = LoRA()
    new.weight,new.bias = m[0].weight,m[0].bias
    with torch.no_grad(): new.a.zero_()
    m.append(nn.Identity()); m[0] = nn.Linear(6,5)
    with pytest.raises(ValueError, match='replaced'): avg.update(m)
    m = nn.Sequential(LoRA(), nn.Identity()); avg = WeightAverage(m); avg.update(m)
    class Watch(nn.Module):
        def train(self, mode=True): self.asked = True; return super().train(mode)
    m[1] = Watch(); m.eval(); m[1].asked = False
    avg.update(m); assert m[1].asked                                # the same parameters in other modules

# --- what is no training ---

def applied(make=cnn, n=2):
    m = make(); avg = WeightAverage(m)
    for _ in range(n): walk(m); avg.update(m)
    mean = [a.clone() for a in avg.average]
    walk(m); own = [p.detach().clone() for p in m.parameters()]
    avg.apply(m)
    return m,avg,mean,own

def test_restore_does_not_destroy_training():
    m,avg,mean,own = applied()
    m[0].weight.data.add_(1e-3)
    trained = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(RuntimeError, match=r'Save the model.*new WeightAverage\(model\).*restore\(model, force=True\)'): avg.restore(m)
    assert all(map(torch.equal, m.parameters(), trained)) and avg.n==2 and avg.applied and not avg.is_applied()
    with pytest.raises(RuntimeError, match='the mean is gone'):
        with avg.swapped(m): pass
    with pytest.warns(UserWarning, match='the mean is gone') as w: avg.restore(m, force=True)
    assert all(map(torch.equal, m.parameters(), own)) and avg.n==0 and not avg.applied and w[0].filename==__file__
    avg.update(m); assert all(map(torch.equal, avg.average, own))

def to_half_and_back(m):
    "As fastai's ModelToHalf does, with its BatchNorm spared"
    for p in m[0].parameters(): p.data = p.data.half().float()
conversions = dict(double=lambda m: m.double(), half=lambda m: m.half(), bfloat16=lambda m: m.bfloat16(), there_and_back=lambda m: m.double().float(),
    half_to_float=lambda m: m.half().float(), bfloat16_to_double=lambda m: m.bfloat16().double(), some=to_half_and_back, channels_last=lambda m: m.to(memory_format=torch.channels_last))

@pytest.mark.parametrize('make', [cnn, half, tiny])
@pytest.mark.parametrize('how', list(conversions))
def test_a_conversion_is_no_training(how, make):
    m,avg,mean,own = applied(make)
    conversions[how](m)
    dtype = next(m.parameters()).dtype
    got = [p.detach().clone() for p in m.parameters()]
    rounded = {'double':mean, 'there_and_back':mean, 'channels_last':mean}.get(how, [a.bfloat16().float() if 'bf' in how else a.half().float() for a in mean])
    tol = dict(atol=0, rtol=0) if make is half or how in ('double','there_and_back','channels_last') else dict(atol=1e-2, rtol=1e-2)
    def is_mean(): return all(torch.allclose(a.double(), e.double(), **tol) and a.dtype.itemsize>=4 for a,e in zip(avg.average,mean))
    assert avg.is_applied() and is_mean() and avg.state_dict()['n']==2
    avg.apply(m)
    assert all(map(torch.equal, m.parameters(), got))
    with avg.swapped(m): pass
    avg.restore(m)
    assert avg.n==2 and is_mean() and all(torch.equal(p, o.to(dtype)) for p,o in zip(m.parameters(),own))
    mean = [a.double().clone() for a in avg.average]                 # and goes on from there
    walk(m); last = snap(m); avg.update(m)
    assert all(torch.allclose(a.double(), (2*e+w)/3, atol=1e-6) for a,e,w in zip(avg.average,mean,last))
    avg.apply(m); assert avg.is_applied()
    avg.restore(m); assert all(map(torch.equal, snap(m), last))

@pytest.mark.parametrize('how', ['double','half','half_to_float'])
def test_training_after_a_conversion_is_training(how):
    m,avg,mean,own = applied()
    conversions[how](m)
    m[4].bias.data[0] += 1e-2
    assert not avg.is_applied()
    with pytest.raises(RuntimeError, match='the mean is gone'): avg.average
    with pytest.raises(RuntimeError, match='force=True'): avg.restore(m)
    with pytest.warns(UserWarning): avg.restore(m, force=True)
    assert all(torch.equal(p, o.to(p.dtype)) for p,o in zip(m.parameters(),own))
    walk(m); avg.update(m); assert all(torch.equal(a, p.to(a.dtype)) for a,p in zip(avg.average,m.parameters()))

@pytest.mark.parametrize('how', ['double','there_and_back'])
def test_the_smallest_step_is_training(how):
    "Though rounded to fewer bits it would be the mean still"
    m,avg,mean,own = applied()
    conversions[how](m)
    m[4].bias.data[0] *= 1+4*torch.finfo(m[4].bias.dtype).eps
    assert not avg.is_applied()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_an_embedding_with_max_norm_trims_its_rows(dtype):
    "In each forward pass, in place: no training, and no reason for a mean that depends on evaluations"
    m = nn.Sequential(nn.Embedding(50, 8, max_norm=1.), nn.Linear(8,3)).to(dtype)
    avg = WeightAverage(m)
    for _ in range(3): walk(m, 1); avg.update(m)
    mean = [a.clone() for a in avg.average]
    with torch.no_grad(), avg.swapped(m): m(torch.arange(20))
    assert all(map(torch.equal, avg.average, mean))
    own = [p.detach().clone() for p in m.parameters()]
    avg.apply(m)
    for i in range(4):
        with torch.no_grad(): m(torch.arange(i, 50, 2))
        assert avg.is_applied()
    avg.restore(m)
    assert all(map(torch.equal, m.parameters(), own)) and avg.n==3 and torch.equal(avg.average[1], mean[1])
    avg.apply(m)
    m[0].weight.data[3,:3] += .5                                    # another length might be trimmed away
    assert not avg.is_applied()

# --- lazy modules ---

def test_lazy_modules():
    def make(): return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    m,ready,x = make(),make(),torch.randn(8,4)
    ready(x)
    with pytest.raises(ValueError, match='run one batch through the model before averaging it'): WeightAverage(m)
    avg = WeightAverage(ready); avg.update(ready)
    for f in (avg.update, avg.copy_to):
        with pytest.raises(ValueError, match='run one batch through the model before averaging it'): f(m)
    assert avg.n==1
    m.load_state_dict(ready.state_dict())                            # has values now, and is lazy until its first batch
    avg = WeightAverage(m); avg.update(m)
    with torch.no_grad(), avg.swapped(m.eval()): m(x)                # becomes what it will be, in the middle
    m.train(); walk(m); own = snap(m)
    avg.update(m); avg.update(ready); avg.apply(m); assert avg.is_applied()
    avg.restore(m); assert all(map(torch.equal, snap(m), own)) and avg.n==3

# --- Ctrl-C ---

_ours = average.__file__,params.__file__,tensors.__file__,utils.__file__
def lines_run(f, at=None):
    "Lines of ours that run in `f`, in their order; with a Ctrl-C at number `at`"
    res = []
    def line(frame, event, arg):
        if event=='line':
            if len(res)==at: signal.raise_signal(signal.SIGINT)
            res.append((frame.f_code.co_filename, frame.f_lineno))
        return line
    old = sys.gettrace()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename in _ours else None)
    try: f()
    finally: sys.settrace(old)
    return res

def small(): return nn.Sequential(nn.Linear(2,2), nn.Linear(2,1,bias=False))
def small_half(): return small().bfloat16()
def small_lora(): return nn.Sequential(LoRA(2,2), nn.Linear(2,1,bias=False))
@pytest.mark.parametrize('what,make', [*((o,small) for o in ('update','update_other','swapped','apply','restore','copy_to','load_state_dict','force')),
    ('apply',small_half), ('swapped',small_lora), ('restore',small_lora)])
def test_ctrl_c_at_any_line(what, make):
    "The model has its own weights or the mean, the count is that of the values, and everything goes on"
    m,other,merges = make(),make(),make is small_lora
    avg0 = WeightAverage(m); avg0.update(m); walk(m); avg0.update(m); walk(m)
    own,theirs = ([p.detach().clone() for p in o.parameters()] for o in (m,other))
    mean = [a.clone() for a in avg0.average]
    saved = dict(n=5, average={k:a+1 for k,a in avg0.state_dict()['average'].items()})
    third = [a+(o.to(a.dtype)-a)/3 for a,o in zip(mean, theirs if what=='update_other' else own)]
    means = {2:mean, 3:third, 5:list(saved['average'].values())}
    is_inside = what in ('restore','force')
    def flat(ts): return torch.cat([t.detach().reshape(-1).float() for t in ts])
    def near(a, b): return (flat(a)-flat(b)).abs().max()<2e-6
    def holds(m, ws): return near(m.parameters(), [w.to(p.dtype) for p,w in zip(m.parameters(),ws)])
    def begin():
        with torch.no_grad():
            for o,ws in ((m,own),(other,theirs)):
                for p,w in zip(o.train().parameters(),ws): p.copy_(w)
        avg = WeightAverage(m)
        avg.load_state_dict(dict(n=2, average=dict(zip(avg.names,mean))))
        if is_inside: avg.apply(m)
        if what=='force': m[0].bias.data.add_(1)
        if merges: m.eval(); other.eval()
        return avg
    def go(avg):
        if what=='swapped':
            with avg.swapped(m): m[0].training
        elif what=='update_other': avg.update(other)
        elif what=='copy_to': avg.copy_to(other)
        elif what=='load_state_dict': avg.load_state_dict(saved)
        elif what=='force':
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                avg.restore(m, force=True)
        else: getattr(avg, what)(m)
    avg = begin()
    lines = lines_run(lambda: go(avg))
    last = {o:i for i,o in enumerate(lines)}
    first = {o:i for i,o in reversed([*enumerate(lines)])}
    assert len(first)>10 and {o[0] for o in first}==set(_ours)
    for i in sorted({*first.values(), *last.values()}):
        avg = begin()
        with pytest.raises(KeyboardInterrupt): lines_run(lambda: go(avg), i)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, lines[i]
        assert set(modes(m)+modes(other))=={not merges}, lines[i]
        m.train(); other.train()
        if what=='force':
            if avg.applied: go(avg)
            assert avg.n==0 and not avg.applied and holds(m, own), lines[i]
            continue
        assert holds(m, mean if avg.applied else own) and (not avg.applied or what=='apply' or is_inside), lines[i]
        assert holds(other, theirs) or (what=='copy_to' and holds(other, mean)), lines[i]
        assert near(avg.average, means[avg.n]), lines[i]
        avg.apply(m);   assert holds(m, means[avg.n]), lines[i]
        avg.restore(m); assert holds(m, own) and near(avg.average, means[avg.n]), lines[i]

# --- states ---

def test_malformed_states_are_refused_before_anything_changes():
    m = cnn(); avg = WeightAverage(m)
    for _ in range(2): walk(m); avg.update(m)
    good = copy.deepcopy(avg.state_dict()); a = good['average']; k = avg.names[-1]
    def but(**kw): return dict(good, average={**a, **kw})
    bad = [(None, 'NoneType'), ([1], 'list'), (a[k], 'Tensor'), ({}, "no \\['average', 'n'\\]"), (dict(n=3), "no \\['average'\\]"),
           *((dict(good, n=n), '0 or more') for n in (-3, 2.5, math.nan, True, '3', None)),
           (dict(good, average=None), 'tensors by name'), (dict(good, average=list(a.values())), 'tensors by name'), (but(**{k:3.}), 'tensors by name'),
           (dict(good, average={}), 'another architecture'), (but(x=a[k]), 'another architecture'), (but(**{k:a[k][:-1]}), 'another architecture'),
           (but(**{k:a[k].to(torch.complex64)}), f'{k} has type'), (but(**{k:a[k].long()}), f'{k} has type'),
           (but(**{k:a[k]*math.nan}), f'{k} is not finite'), (but(**{k:a[k]/0}), f'{k} is not finite')]
    for state,msg in bad:
        with pytest.raises((TypeError,ValueError), match=msg): avg.load_state_dict(state)
        assert avg.n==2 and all(map(torch.equal, avg.average, a.values()))
    for n in (2, np.int64(2), torch.tensor(2)):
        new = WeightAverage(m); new.load_state_dict(dict(good, n=n, more='anything'))
        assert new.n==2 and type(new.n) is int and all(map(torch.equal, new.average, a.values()))
    new.load_state_dict(dict(n=0, average={})); assert new.n==0

# --- constant parameters that are no numbers ---

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_a_frozen_mask_keeps_its_infinities(dtype):
    def mask(n): return nn.Parameter(torch.full((n,n), -math.inf, dtype=dtype).triu(1), requires_grad=False)
    m = nn.Module()
    m.first,m.mask,m.vec,m.last = nn.Linear(3,3,dtype=dtype),mask(4),nn.Parameter(torch.tensor([0.,-math.inf,.1], dtype=dtype), requires_grad=False),nn.Linear(3,3,dtype=dtype)
    m.large = mask(80)
    frozen = [p.detach().clone() for p in m.parameters() if not p.requires_grad]
    def held(ps): return all(map(torch.equal, (p.to(dtype) for p,q in zip(ps, m.parameters()) if not q.requires_grad), frozen))
    avg,other,snaps = WeightAverage(m),copy.deepcopy(m),[]
    for _ in range(7): walk(m); avg.update(m); snaps.append(snap(m))
    assert held(avg.average)
    for a,p,e in zip(avg.average, m.parameters(), exact(snaps)):
        if p.requires_grad: torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)
    new,saved = WeightAverage(m),avg.state_dict()
    new.load_state_dict(saved)                                          # a saved mask is no diverged training
    for bad in (-saved['average']['mask'], saved['average']['mask']/0):
        with pytest.raises(ValueError, match='mask is not finite'): new.load_state_dict(dict(saved, average={**saved['average'], 'mask':bad}))
    avg.update(other); assert held(avg.average)
    with avg.swapped(m): assert held(m.parameters())
    avg.apply(m); assert held(m.parameters()) and avg.is_applied()
    avg.restore(m); assert held(m.parameters())
    m.mask.requires_grad_(True)                                         # unfrozen: what moves is averaged, what does not stays
    with torch.no_grad(): m.mask[1,0] += 8
    avg.update(m)
    assert avg.average[0][1,0]==8/9 and torch.equal(avg.average[0].isinf(), frozen[0].isinf())

def test_many_tiny_tensors_are_looked_at_together():
    ts = [torch.ones(n) for n in [1,64,4095]*50]
    assert all_finite(ts) and all_finite(t for t in ts)
    for i in (0, 77, 149):
        ts[i][-1] = math.nan
        assert not all_finite(ts)
        ts[i][-1] = 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: all_finite([torch.ones(64, requires_grad=True) for _ in range(500)])
    assert len([e for e in prof.events() if e.name in ('aten::sum','aten::cat','aten::aminmax')])<=3

# --- what a person sees ---

def test_repr():
    avg = WeightAverage(nn.Sequential(nn.Linear(3,4), nn.Linear(4,2)))
    assert repr(avg)=='WeightAverage(n=0, 4 tensors, 26 weights)'
    avg.update(avg.model); avg.apply(avg.model)
    assert repr(avg)=='WeightAverage(n=1, 4 tensors, 26 weights, in the model)'
    assert repr(WeightAverage(nn.Linear(1000,1300)))=='WeightAverage(n=0, 2 tensors, 1.3M weights)'
    assert repr(WeightAverage(nn.Linear(99,99)))=='WeightAverage(n=0, 2 tensors, 9,900 weights)'

def test_a_learner_is_not_a_model():
    class Learner:
        "As fastai's: what it lacks is looked up in its model"
        def __init__(self, model): self.model = model
        def __getattr__(self, k): return getattr(self.model, k)
    m = cnn(); avg = WeightAverage(m)
    for model in (m, torch.compile(m)):
        for f in (WeightAverage, avg.update, avg.swapped, avg.apply, avg.restore, avg.copy_to):
            with pytest.raises(TypeError, match='not Learner.*learn.model'):
                res = f(Learner(model))
                with res: pass
    with pytest.raises(TypeError, match='learn.model'): avg.update(None)
    for f in (avg.apply, avg.copy_to, avg.swapped):
        with pytest.raises(RuntimeError, match='nothing has been averaged yet'):
            with f(m): pass

# ---- states of averages that keep more than a mean, as they have always been written: of five snapshots 1, 4, 2, 8 and -3

from fastswa.auto import NestedMeans
from fastswa.lawa import WindowAverage
from fastswa.swag import SWAGAverage

def with_tensors(o):
    "The lists of numbers in it as tensors"
    if isinstance(o, dict): return {k:torch.tensor(v) if k in ('weight','bias') else with_tensors(v) for k,v in o.items()}
    return type(o)(map(with_tensors, o)) if isinstance(o, (list,tuple)) else o

def plain(o):
    if isinstance(o, dict): return {k:plain(v) for k,v in o.items()}
    return o.tolist() if isinstance(o, torch.Tensor) else type(o)(map(plain, o)) if isinstance(o, (list,tuple)) else o

more = dict(
    window=(lambda m: WindowAverage(m, 3), dict(
        n=3, average=dict(weight=[[2.3333332538604736, 2.8333332538604736]], bias=[3.3333332538604736]), k=3,
        window=[(3, dict(weight=[[2.,2.5]], bias=[3.])), (4, dict(weight=[[8.,8.5]], bias=[9.])), (5, dict(weight=[[-3.,-2.5]], bias=[-2.]))])),
    spread=(lambda m: SWAGAverage(m, 2), dict(
        n=5, average=dict(weight=[[2.4000000953674316, 2.9000000953674316]], bias=[3.4000000953674316]),
        spread=[dict(weight=[[13.040000915527344, 13.040000915527344]], bias=[13.040000915527344]), dict(weight=[[4.25,4.25]], bias=[4.25]),
                dict(weight=[[-5.400000095367432, -5.400000095367432]], bias=[-5.400000095367432])])),
    tail=(NestedMeans, dict(
        n=5, average=dict(weight=[[2.4000000953674316, 2.9000000953674316]], bias=[3.4000000953674316]),
        tail=dict(n=2, average=dict(weight=[[2.5,3.]], bias=[3.5])))))

@pytest.mark.parametrize('key', more)
def test_states_are_read_and_written_as_ever(key, tmp_path):
    make,old = more[key]
    torch.save(with_tensors(old), tmp_path/'f')
    m = nn.Linear(2,1)
    avg = make(m)
    avg.load_state_dict(torch.load(tmp_path/'f', weights_only=True))
    assert plain(avg.state_dict())==old and list(avg.state_dict())==list(old)
    walked = make(m)
    for i,v in enumerate((1.,4.,2.,8.,-3.)):
        with torch.no_grad(): m.weight.copy_(torch.tensor([[v,v+.5]])); m.bias.fill_(v+1)
        walked.update(m)
        if key=='tail' and i==2: walked.tail.n = 0
    torch.testing.assert_close(with_tensors(plain(walked.state_dict())), with_tensors(old))

@pytest.mark.parametrize('key', more)
@pytest.mark.parametrize('wrong', [dict(weight=[[1.]], bias=[1.]), dict(weight=[[1.,1.]]), dict(weight=[[1.,math.nan]], bias=[1.]), [1.]])
def test_what_is_kept_beside_a_mean_is_checked_as_the_mean_is(key, wrong):
    "And nothing has changed then, the mean neither"
    make,old = more[key]
    m = nn.Linear(2,1)
    avg,bad = make(m),with_tensors(old)
    with torch.no_grad(): m.weight.fill_(7.); m.bias.fill_(7.)
    avg.update(m)
    was = plain(avg.state_dict())
    wrong = with_tensors(wrong)
    if key=='tail': bad['tail'] = dict(n=2, average=wrong)
    elif key=='window': bad['window'][2] = (5,wrong)
    else: bad['spread'][2] = wrong
    with pytest.raises((ValueError,TypeError)): avg.load_state_dict(bad)
    assert plain(avg.state_dict())==was
