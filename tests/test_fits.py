"Parameter groups, hyperparameters and optimizers around the held rate; fits that are counted in steps rather than epochs"
import math, sys, time, tracemalloc

import pytest, torch
from common import *
from fastswa.callback import SWA
from fastswa.cycle import FineTunePhase, FitState
from fastswa.schedule import Cycles, swa_cycles

learner = partial(learner, n=50, bs=10, n_valid=20)   # five batches in an epoch
def three_groups(m): return [list(m[:3].parameters()), list(m[3:6].parameters()), list(m[6:].parameters())]
def assert_mean(l, spy, its):
    for p,o in zip(l.model.parameters(), spy.mean(its)): torch.testing.assert_close(p.detach().double(), o, atol=1e-6, rtol=1e-6)

class Hypers(Callback):
    "All hyperparameters of all groups at each step"
    order,run_valid = 1000,False
    def before_fit(self): self.hs = []
    def before_step(self): self.hs.append([dict(h) for h in self.learn.opt.hypers])
    def of(self, k, its=slice(None)): return [[float(g[k]) for g in h] for h in self.hs[its]]

# ---- 4. groups and hyperparameters

rates = [(None,[.01,.02,.05]), (.06,[.012,.024,.06]), (slice(.03),[.003,.003,.03]), (slice(.001,.1),[.001,.01,.1]), ([.01,0.,.03],[.01,0.,.03])]
highest = [(.3,[.06,.12,.3]), ([.1,.2,.3],[.1,.2,.3])]
@pytest.mark.parametrize('swa_lr,lo,swa_lr_max,hi,method', [*((*o,None,None,'fit_one_cycle') for o in rates), *((*o,*highest[i%2],'fit') for i,o in enumerate(rates))])
def test_three_groups(swa_lr, lo, swa_lr_max, hi, method):
    "One number keeps the proportions the groups had at their highest; slices and lists mean what they mean in `fit`"
    l,spy,swa = learner(splitter=three_groups),Spy(),SWA(start=2, cycle_len=1, swa_lr=swa_lr, swa_lr_max=swa_lr_max)
    fit(l, 4, np.array([.02,.04,.1]), method=method, cbs=[swa,spy])
    t = np.tile(np.arange(1,6)/5, 2)[:,None]
    np.testing.assert_allclose(spy.lrs[10:], (1-t)*(lo if hi is None else hi)+t*lo, rtol=1e-6)
    if method=='fit': np.testing.assert_allclose(spy.lrs[:10], [[.02,.04,.1]]*10)
    assert swa.collected==[15,20]; assert_mean(l, spy, [15,20])

@pytest.mark.parametrize('train_bn', [True,False])
def test_frozen_groups_stay_as_they_are(train_bn):
    "To the last bit, after many snapshots; layers of BatchNorm train in them unless told not to"
    seed(); m = nn.Sequential(nn.Flatten(), nn.Linear(64,70), nn.BatchNorm1d(70), nn.Linear(70,20), nn.BatchNorm1d(20), nn.Linear(20,10))   # tensors of 4480 weights and of few
    groups = lambda m: [list(m[:3].parameters()), list(m[3:5].parameters()), list(m[5:].parameters())]
    l = Learner(dls(50, 10, 20), m, loss_func=CrossEntropyLossFlat(), opt_func=sgd, lr=.1, splitter=groups, train_bn=train_bn)
    l.freeze_to(-1)
    start,spy,swa = weights(l.model),Spy(),SWA(start=0, cycle_len=.2)
    fit(l, 6, slice(.01,.1), cbs=[swa,spy])
    moved = [not torch.equal(a,b) for a,b in zip(start,weights(l.model))]
    assert moved==[False,False,train_bn,train_bn]*2+[True,True] and swa.n_averaged==30
    assert_mean(l, spy, swa.collected)
    np.testing.assert_allclose(spy.lrs, [[.005,.05/10**.5,.05]]*30)               # frozen groups have a rate too: half of theirs in slice(.01,.1)

def test_unfrozen_within_the_fit():
    class Unfreeze(Callback):
        def before_epoch(self): self.learn.freeze_to(-1-self.epoch)
    l = learner(splitter=three_groups); start,spy,swa = weights(l.model),Spy(),SWA(start=1, cycle_len=1)
    fit(l, 4, cbs=[swa,Unfreeze(),spy])
    assert_mean(l, spy, [10,15,20])
    assert torch.equal(spy.ws[9][0], start[0]) and not torch.equal(spy.ws[14][0], start[0]) and swa.n_averaged==3

def test_only_rate_and_momentum_are_held():
    "Everything else goes on following its own schedule"
    sched = lambda: ParamScheduler({'wd':SchedLin(.1,0.), 'sqr_mom':SchedCos(.999,.9), 'eps':SchedExp(1e-8,1e-4)})
    def go(*cbs):
        h = Hypers(); fit(learner(opt_func=Adam, splitter=three_groups), 4, slice(1e-3,1e-2), method='fit_one_cycle', cbs=[h,sched(),*cbs])
        return h
    ref,got = go(),go(SWA())
    assert set(got.hs[0][0])=={'lr','mom','wd','sqr_mom','eps'}
    for k in ('wd','sqr_mom','eps'): assert got.of(k)==ref.of(k) and len(set(map(str, got.of(k))))==20
    for k in ('lr','mom'):           assert got.of(k)[:15]==ref.of(k)[:15] and len(set(map(str, got.of(k)[15:])))==1 and ref.of(k)[15]!=ref.of(k)[19]

def test_momentum_of_each_group_is_held():
    "At what it was when averaging began"
    l,h = learner(splitter=two_groups),Hypers()
    fit(l, 4, cbs=[SWA(), h, ParamScheduler({'mom':SchedLin(np.array([.9,.8]), np.array([.5,.4]))})])
    np.testing.assert_allclose(h.of('mom'), [[.9-.4*min(i,15)/20, .8-.4*min(i,15)/20] for i in range(20)])
    h2 = Hypers(); fit(learner(), 4, method='fit_one_cycle', cbs=[SWA(swa_lr=False), h2], div_final=2)
    assert len(set(map(str, h2.of('mom', slice(5,None)))))==15                     # nothing is held where the schedule is left alone

torch_opts = [('SGD',dict(momentum=.9)), ('SGD',{}), ('AdamW',{}), ('RMSprop',{}), ('Adagrad',{}), ('Adadelta',{}), ('Rprop',{})]
@pytest.mark.parametrize('opt,kw', torch_opts)
def test_torchs_optimizers(opt, kw):
    "With groups, and also where there is no momentum or weight decay to speak of"
    l,h,spy,swa = learner(opt_func=partial(OptimWrapper, opt=getattr(torch.optim,opt), **kw), splitter=two_groups),Hypers(),Spy(),SWA()
    fit(l, 4, slice(.001,.01), cbs=[swa,h,spy])
    np.testing.assert_allclose(h.of('lr'), [[.001,.01]]*15+[[.0005,.005]]*5); assert swa.collected==[16,17,18,19,20]
    assert_mean(l, spy, swa.collected)
    np.testing.assert_allclose([g['lr'] for g in l.opt.opt.param_groups], [.0005,.005])     # torch's own groups, which do the step
    assert ('mom' in h.hs[0][0])==(opt not in ('Adagrad','Adadelta','Rprop'))

@pytest.mark.parametrize('opt', ['SGD','AdamW'])
def test_torchs_momentum_is_held(opt):
    l,h = learner(opt_func=partial(OptimWrapper, opt=getattr(torch.optim,opt)), splitter=two_groups),Hypers()
    fit(l, 4, .01, method='fit_one_cycle', cbs=[SWA(),h])
    for k in ('lr','mom'): assert len(set(map(str, h.of(k)[15:])))==1 and len(set(map(str, h.of(k)[5:15])))==10
    held = [g['momentum'] if opt=='SGD' else g['betas'][0] for g in l.opt.opt.param_groups]
    assert held==h.of('mom')[-1]
    if opt=='AdamW': assert all(g['betas'][1]==.999 for g in l.opt.opt.param_groups)

def test_an_optimizer_that_was_built_before():
    l,spy,swa = learner(),Spy(),SWA()
    l.opt = OptimWrapper(opt=torch.optim.SGD([dict(params=list(o)) for o in two_groups(l.model)], lr=.1, momentum=.9))
    fit(l, 4, [.01,.1], cbs=[swa,spy])
    np.testing.assert_allclose(spy.lrs, [[.01,.1]]*15+[[.005,.05]]*5); assert_mean(l, spy, swa.collected)

# ---- 5. steps

@pytest.mark.parametrize('n_batch,ends', [(40,range(31,41)), (5,(4,5)), (1,(1,))])
def test_one_epoch_is_enough(n_batch, ends):
    l,spy,swa = learner(n=5*n_batch, bs=5),Spy(),SWA(eval_every=1); fit(l, 1, cbs=[swa,spy])
    assert swa.collected==list(ends) and swa.n_averaged==len(swa.collected)
    assert_mean(l, spy, swa.collected)
    begin = ends[0]-1
    np.testing.assert_allclose(spy.lrs, [[.1]]*begin+[[.05]]*(n_batch-begin))
    with quiet(l): np.testing.assert_allclose(l.validate(), l.recorder.values[0][-2:], rtol=1e-6)

@pytest.mark.parametrize('start', [0,1])
@pytest.mark.parametrize('k', [1,2,3,4,7])
def test_every_k_iterations(k, start):
    "Counted back from the end of the fit, across epochs of five"
    l,spy,swa = learner(),Spy(),SWA(start=start, cycle_len=k/5, swa_lr=.05, swa_lr_max=.1); fit(l, 3, cbs=[swa,spy])
    want = [o for o in range(1,16) if (15-o)%k==0 and o-k>=5*start]
    assert swa.collected==want; assert_mean(l, spy, want)
    rates = np.array(spy.lrs)[:,0]
    np.testing.assert_allclose(rates[[o-1 for o in want]], .05)
    for a,b in zip(want,want[1:]): np.testing.assert_allclose(rates[a:b], .1-.05*np.arange(1,b-a+1)/(b-a))

def test_every_k_iterations_of_any_epoch():
    "Rounding `k/n_iter` moves no end, however long the epoch"
    r = random.Random(0)
    for n_iter in (7,49,1000,4099,10**5,10**7-1):
        for k in (1,3,7,r.randint(1,n_iter),n_iter):
            if n_iter/k>3e5: continue                     # the plan itself has as many ends
            assert list(swa_cycles(1, n_iter, 0, k/n_iter).ends)==list(range(n_iter-(n_iter//k-1)*k, n_iter+1, k)), (n_iter,k)

def test_epochs_of_millions_of_iterations_are_planned_at_once():
    "The plan is as long as there are collections, not iterations"
    n = 10**7
    for kw,ends in [({}, 10), (dict(start=.5, cycle_len=.001), 500), (dict(start=0, cycle_len=1), 1)]:
        swa = SWA(**kw)
        tracemalloc.start()
        try: cyc,peak = swa.plan(1, n),tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
        assert len(cyc.ends)==ends and cyc.ends[-1]==n and peak<1000+200*ends

class Counting(tuple):
    "Counts how often it is looked into"
    reads = 0
    def __getitem__(self, i): self.reads += 1; return super().__getitem__(i)
    def __iter__(self):
        for i in range(len(self)): yield self[i]

def calls(f):
    "Calls of functions, Python's and C's, that `f` makes"
    n = 0
    def count(frame, event, arg):
        nonlocal n
        n += event in ('call','c_call')
    sys.setprofile(count)
    try: f()
    finally: sys.setprofile(None)
    return n

def test_an_iteration_costs_the_same_in_an_epoch_of_any_length():
    "No list is scanned, none is copied: neither for the rate, nor for the end of the cycle"
    swa = SWA(start=0, swa_lr=.01, swa_lr_max=.1); l = learner(cbs=swa); l.create_opt()
    def iterate(k=50):
        for _ in range(k): swa.after_pred(); swa.after_batch()
    def begin(n_iter, step, done, kind=tuple):
        swa.fit_state = swa._coming = FitState(cycles=Cycles(0, kind(range(step, n_iter+1, step)), n_iter), epoch=0, done=done)
        swa.fit_state.look_ahead()
        return swa.fit_state.cycles.ends
    def cost(*args):
        begin(*args); ops = calls(iterate)
        ts = []
        for _ in range(7): t = time.thread_time(); iterate(); ts.append(time.thread_time()-t)
        ends = begin(*args, Counting); ends.reads = 0; iterate()
        assert swa.fit_state.done==args[2]+50 and len(swa.fit_state.lrs)==50
        return ops,ends.reads/50,min(ts)
    small,big = cost(10**4, 10**4, 5000),cost(10**7, 500, 7*10**6+12)        # none of these iterations ends a cycle
    assert small[0]==big[0] and big[1]<=2*math.log2(20_000)+4 and big[2]<3*small[2], (small,big)
    begin(10**7, 500, 7*10**6)
    assert swa.fit_state.next_collect==7*10**6+500

# ---- loaders without an index

class Stream(torch.utils.data.IterableDataset):
    "Items one after the other, from no list"
    def __init__(self, n=80): self.n = n
    def __iter__(self): return iter(zip(X[:self.n],Y[:self.n]))
class Sized(Stream):
    def __init__(self, n=80, says=None): super().__init__(n); self.says = n if says is None else says
    def __len__(self): return self.says
TorchDL = torch.utils.data.DataLoader
def streaming(train): return learner(data=DataLoaders(train, TorchDL(torch.utils.data.TensorDataset(X[:50],Y[:50]), 25)))

@pytest.mark.parametrize('make', [lambda: TorchDL(Sized(), 20), lambda: FastaiDataLoader(Stream(), bs=20, n=80), lambda: FastaiDataLoader(Sized(), bs=20)])
def test_streams_with_a_length(make):
    l,spy,swa = streaming(make()),Spy(),SWA(start=1, cycle_len=.5, eval_every=1); fit(l, 3, cbs=[swa,spy])
    assert swa.collected==[6,8,10,12]; assert_mean(l, spy, swa.collected)
    x = l.model[0](X[:80]).detach()
    torch.testing.assert_close(l.model[1].running_mean, x.mean((0,2,3)), atol=1e-6, rtol=1e-5)
    with quiet(l): np.testing.assert_allclose(l.validate(), l.recorder.values[-1][-2:], rtol=1e-6)

@pytest.mark.parametrize('says', [120,40])
def test_streams_whose_length_is_wrong(says, recwarn):
    "Of six batches promised, or two, four come: each epoch still counts as one"
    l,swa = streaming(TorchDL(Sized(80, says), 20)),SWA(start=0, cycle_len=1); fit(l, 3, cbs=swa)
    assert swa.n_averaged==3 and swa.collected==[says//20*k for k in (1,2,3)]

@pytest.mark.parametrize('method', ['fit','fit_swa'])
@pytest.mark.parametrize('make', [lambda: TorchDL(Stream(), 20), lambda: FastaiDataLoader(Stream(), bs=20)])
def test_streams_without_a_length(make, method):
    l = streaming(make())
    with pytest.raises(TypeError, match='length'): fit(l, 2, **dict(cbs=SWA()) if method=='fit' else {}, method=method)

# ---- the two fits of fine_tune

def test_what_looks_like_a_fit_within_fine_tune_does_not_begin_the_second():
    "`validate` in the frozen part, and events outside of the lock, as `tta` has them"
    class Look(Callback):
        order,seen = -50,[]
        def before_epoch(self):
            if self.learn.lock.locked() or not self.learn.opt.frozen_idx: return
            with self.learn.no_bar(), self.learn.no_logging(): self.learn.validate()
            for event in 'before_fit','before_epoch','after_epoch','after_fit':
                for cb in self.learn._grab_cbs(FineTunePhase)+self.learn._grab_cbs(SWA): cb(event)
            for cb in self.learn._grab_cbs(SWA): cb('before_fit')
        def after_train(self):
            if self.learn.opt.frozen_idx: self.seen.append(swa.n_averaged)
    l,swa,look = learner(splitter=two_groups),SWA(start=0),Look()
    with quiet(l): l.fine_tune(2, freeze_epochs=3, cbs=[swa, look])
    assert look.seen==[0,0,0] and swa.collected==list(range(1,11))
