"Promises 3, 8 and 10 of the running mean: exact, in place, one copy, safe against interrupts and changed models"
import copy, gc, signal, threading, weakref

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fastswa import average
from fastswa.average import WeightAverage, all_finite, unwrap

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
    with pytest.warns(UserWarning, match='the mean is gone'): avg.restore(m)
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
    calls,dense,at = [],average._is_dense,2 if what!='swapped' else len(own)+2     # in swapped: on the way back
    def ctrl_c(t):
        calls.append(1)
        if len(calls)==at: signal.raise_signal(signal.SIGINT)
        return dense(t)
    monkeypatch.setattr(average, '_is_dense', ctrl_c)
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
    assert all(torch.equal(p,w) for p,w in zip(m.parameters(),want)) and avg.inside==(what=='apply') and len(calls)>2
    assert all(torch.equal(a,w) for a,w in zip(avg.average,mean))

def test_other_threads_need_no_signals():
    m = cnn(); avg = WeightAverage(m); avg.update(m); walk(m); res = []
    t = threading.Thread(target=lambda: (avg.apply(m), res.append(avg.inside))); t.start(); t.join()
    assert res==[True]
