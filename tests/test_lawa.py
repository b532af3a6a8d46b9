"LAWA: its window by hand, where its snapshots lie, what goes on with the same window, and the promises it shares with the others"
import math, signal
from copy import deepcopy

import pytest, torch
from common import *
from fastswa.all import *
from fastswa.lawa import LAWA, WindowAverage

def by_hand(ws, k):
    "The mean in float64 of the last `k` of the weights `ws`"
    return [torch.stack([o.double() for o in ps]).mean(0) for ps in zip(*ws[-k:])]

def assert_close(model, mean, tol=1e-6):
    for p,m in zip(model.parameters() if isinstance(model, nn.Module) else model, mean, strict=True):
        torch.testing.assert_close(p.detach().double(), m, atol=tol, rtol=tol)

def walk(model, n, s=0, size=1.):
    "Snapshots of `n` made-up weights of `model`, which has them one after the other"
    g = torch.Generator().manual_seed(s)
    for _ in range(n):
        with torch.no_grad():
            for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g)*size)
        yield weights(model)

# ---- the window

@pytest.mark.parametrize('k', [1, 3, 5])
def test_by_hand_before_and_after_the_window_is_full(k):
    m,ws = net(),[]
    avg = WindowAverage(m, k)
    for w in walk(m, 8):
        ws.append(w)
        avg.update(m)
        assert avg.n==len(avg.window)==min(k, len(ws))
        assert_close(avg.average, by_hand(ws, k))
        assert same(weights(m), w)

def test_single_numbers():
    m,seen = nn.Linear(1, 1, bias=False),[]
    avg = WindowAverage(m, 3)
    for v in 2,4,9,5,1,6:
        nn.init.constant_(m.weight, v)
        avg.update(m)
        seen.append(avg.average[0].item())
    np.testing.assert_allclose(seen, [2, 3, 5, 6, 5, 4], rtol=1e-6)      # 2/1 6/2 15/3 18/3 15/3 12/3

def test_nothing_is_left_of_what_the_window_has_left():
    "A running sum would keep the rounding of 1e12 for ever; and a long walk ends as a short one with the same end"
    m = net()
    long,short = WindowAverage(m, 4),WindowAverage(m, 4)
    for _ in walk(m, 3, size=1e12): long.update(m)
    for _ in walk(m, 300, s=1): long.update(m)
    for _ in walk(m, 4, s=2):
        long.update(m)
        short.update(m)
    assert same(long.average, short.average)

def test_weights_that_do_not_move_are_the_mean_to_the_bit():
    m = net()
    with torch.no_grad(): m[0].bias.fill_(-math.inf)
    avg,before = WindowAverage(m, 7),weights(m)
    for _ in range(20):
        avg.update(m)
        assert same(avg.average, before)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_to_the_rounding_of_float32_whatever_the_weights_are(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Parameter(torch.zeros(3,4,dtype=dtype)),nn.Parameter(torch.zeros(70,80,dtype=dtype))
    m,ws = Model(),[]
    avg = WindowAverage(m, 5)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for _ in range(9):
        with torch.no_grad():
            for p in m.parameters(): p.copy_(torch.randn(p.shape, dtype=torch.complex64 if dtype.is_complex else torch.float32))
        ws.append([w.to(wide) for w in weights(m)])
        avg.update(m)
    tol = 1e-14 if dtype==torch.float64 else 5e-7
    for a,*os in zip(avg.average, *ws[-5:], strict=True):
        assert a.dtype==(dtype if dtype in (torch.float64,torch.complex64) else torch.float32)
        torch.testing.assert_close(a.to(wide), torch.stack(os).mean(0), atol=tol, rtol=0)

def test_another_model_of_the_same_architecture():
    m,other = net(),net()
    half,a,b,c = deepcopy(m).bfloat16(),*(WindowAverage(m, 3) for _ in range(3))
    d = WindowAverage(half, 3)
    for w in walk(other, 5):
        m.load_state_dict(other.state_dict())
        half.load_state_dict(other.state_dict())
        a.update(m)
        b.update(other)
        c.update(half)
        d.update(other)
        nn.init.zeros_(m[0].weight)              # what is taken is a copy
    assert same(a.average, b.average) and not same(a.average, c.average)
    assert same(a.average, d.average)            # of a half-precision model, and nothing of another is rounded
    assert_close(a.average, [o.double() for o in c.average], 2e-2)
    with pytest.raises(ValueError, match='architecture'): a.update(plain_net())
    assert a.n==3

def test_put_in_and_taken_out():
    m,ws = net(),[]
    avg = WindowAverage(m, 3)
    for w in walk(m, 5):
        ws.append(w)
        avg.update(m)
    with avg.swapped(m): assert_close(m, by_hand(ws, 3))
    avg.apply(m)
    assert_close(m, by_hand(ws, 3))
    with pytest.raises(RuntimeError, match='restore'): avg.update(m)
    assert avg.n==3 and len(avg.window)==3
    avg.restore(m)
    assert same(weights(m), ws[-1])
    for w in walk(m, 1, s=1): ws.append(w)
    avg.update(m)
    assert_close(avg.average, by_hand(ws, 3))
    assert_close(avg.copy_to(net()), by_hand(ws, 3))

def test_a_model_that_has_become_another_type_goes_on():
    m,ws = net(),[]
    avg = WindowAverage(m, 3)
    for dtype,s in (torch.float32,0),(torch.bfloat16,1),(torch.float64,2):
        m.to(dtype)
        for w in walk(m, 2, s):
            ws.append(w)
            avg.update(m)
            assert_close(avg.average, by_hand(ws, 3))

@pytest.mark.parametrize('what,at', [('update',1), ('update',2), ('update',4), ('load_state_dict',3), ('load_state_dict',11)])
def test_interrupted_in_the_middle(what, at):
    "Ctrl-C while the mean is made anew, or read: mean, window and count agree afterwards"
    m,ws = net(),[]
    avg,other = WindowAverage(m, 3),WindowAverage(m, 3)
    for i,w in enumerate(walk(m, 5)):
        ws.append(w)
        other.update(m)
        if i<4: avg.update(m)
    calls,lerp,tensors = [],avg.shadow.lerp,avg.shadow.tensors
    def ctrl_c(o):
        calls.append(1)
        if len(calls)==at: signal.raise_signal(signal.SIGINT)
        return o
    class Slow(list):
        def __iter__(self): return map(ctrl_c, tensors)
    if what=='update': avg.shadow.lerp = lambda *args: lerp(*ctrl_c(args))
    else: avg.shadow.tensors = Slow(tensors)
    with pytest.raises(KeyboardInterrupt): getattr(avg, what)(m if what=='update' else other.state_dict())
    avg.shadow.lerp,avg.shadow.tensors = lerp,tensors
    assert len(calls)>3 and avg.n==3 and same(avg.average, other.average)
    assert all(same(a,b) for (_,a),(_,b) in zip(avg.window, other.window, strict=True))

# ---- its state

@pytest.mark.parametrize('n', [0, 1, 2, 3, 7])
def test_a_state_has_the_window(n, tmp_path):
    m = net()
    avg = WindowAverage(m, 3)
    for _ in walk(m, n): avg.update(m)
    torch.save(avg.state_dict(), tmp_path/'s')
    m2 = deepcopy(m)
    again = WindowAverage(m2, 3)
    again.load_state_dict(torch.load(tmp_path/'s', weights_only=True))
    assert again.n==avg.n and same(again.average, avg.average)
    for _ in range(4):
        for w in walk(m, 1, s=5): avg.update(m)
        m2.load_state_dict(m.state_dict())
        again.update(m2)
        assert same(again.average, avg.average) and again.n==avg.n

def test_states_it_cannot_go_on_with():
    m = net()
    avg,plain,short = WindowAverage(m, 3),WeightAverage(m),WindowAverage(m, 3)
    for i,_ in enumerate(walk(m, 4)):
        avg.update(m)
        plain.update(m)
        if i<2: short.update(m)
    wide,before = WindowAverage(m, 5),weights(m)
    for bad,match in (plain.state_dict(),'no window of snapshots'),(avg.state_dict(),'the last 3 snapshots, k=5 needs earlier ones: use k=3'):
        with pytest.raises(ValueError, match=match): wide.load_state_dict(bad)
    damaged = avg.state_dict()
    damaged['window'][1][1]['0.weight'] = torch.zeros(2)
    with pytest.raises(ValueError, match='0.weight'): short.load_state_dict(damaged)
    assert wide.n==0 and wide.window==[] and short.n==2 and len(short.window)==2 and same(weights(m), before)
    wide.load_state_dict(short.state_dict())                 # not full: all there is, for any k
    assert wide.n==2 and same(wide.average, short.average)
    narrow = WindowAverage(m, 2)
    narrow.load_state_dict(avg.state_dict())                 # as it was saved, until the next
    assert narrow.n==3 and same(narrow.average, avg.average)
    for w in walk(m, 1, s=9): narrow.update(m); avg.update(m)
    assert narrow.n==2 and same([narrow.window[i][1][0] for i in (0,1)], [avg.window[i][1][0] for i in (1,2)])

def test_rebase_leaves_the_window_of_the_walk():
    m,ws = net(),[]
    avg = WindowAverage(m, 3)
    for w in walk(m, 4):
        ws.append(w)
        avg.update(m)
    avg.apply(m)
    best = next(walk(m, 1, s=3))
    avg.rebase(2)
    assert same(avg.average, best) and avg.n==2
    again = WindowAverage(net(), 3)
    again.load_state_dict(avg.state_dict())
    assert same(again.average, best) and again.n==2
    avg.restore(m)
    assert same(weights(m), ws[-1])
    ws.append(next(walk(m, 1, s=4)))
    for o in avg,again: o.update(m)
    assert avg.n==3 and same(avg.average, again.average)
    assert_close(avg.average, by_hand(ws, 3))

# ---- where snapshots lie

@pytest.mark.parametrize('kw,n_epoch,n_iter,ends', [
    (dict(k=5), 20, 10, range(10,201,10)),                   # one at the end of each epoch
    (dict(k=5), 40, 7, range(7,281,7)),
    (dict(k=5), 10, 10, range(5,101,5)),                     # the window is a quarter of the fit
    (dict(k=5), 1, 100, range(5,101,5)),
    (dict(k=2), 8, 5, range(5,41,5)),
    (dict(k=2), 4, 5, [2,5,7,10,12,15,17,20]),               # 2.5 iterations each, rounded one by one
    (dict(k=5), 1, 3, [1,2,3]),                              # no closer than each iteration
    (dict(k=5, every=1), 3, 5, [5,10,15]),
    (dict(k=5, every=2), 5, 5, [15,25]),                     # the last is the end of the fit
    (dict(k=5, every=.5), 2, 10, [5,10,15,20]),
    (dict(k=5, every=1, start=2), 5, 5, [15,20,25]),
    (dict(k=5, start=.5), 40, 10, range(210,401,10)),
    (dict(k=5, start=.9), 10, 20, [184,188,192,196,200]),    # full all the same
    (dict(k=3, start=3), 3, 5, []),
    (dict(k=3), 0, 5, []), (dict(k=3), 3, 0, []),
])
def test_places(kw, n_epoch, n_iter, ends):
    assert [*LAWA(**kw).plan(n_epoch, n_iter).ends]==[*ends]

@pytest.mark.parametrize('n_epoch,kw', [(3, dict(k=5, every=1)), (5, dict(k=5, every=1)), (8, dict(k=5, every=1)), (4, dict(k=2)), (4, dict(k=3, every=.4)), (4, dict(start=.5)), (5, dict(k=1))])
def test_mean_of_the_last_of_a_fit(n_epoch, kw):
    l,spy,lawa = learner(),Spy(),LAWA(**kw)
    fit(l, n_epoch, cbs=[lawa, spy])
    its = lawa.plan(n_epoch, 5).ends[-lawa.k:]
    assert lawa.collected==[*its] and lawa.n_averaged==len(its) and its[-1]==5*n_epoch
    assert_close(l.model, spy.mean(its))

@pytest.mark.parametrize('cb,ends,kw', [(lambda: SWA(cycle_len=2),[5,10,15,20,25,30,40],{}), (lambda: SWA(cycle_len=2, swa_lr=False),range(5,41,5),{}),
    (lambda: SnapshotEnsemble(4),[10,20,30,40],{}), (lambda: SnapshotEnsemble(4),[30,40],dict(start=.5)), (lambda: FGE(.5, cycle_len=1),[5,10,15,20,24,28,32,36,40],{})])
def test_beside_those_who_set_cycles(cb, ends, kw):
    l,spy,cb,lawa = learner(),Spy(),cb(),LAWA(2, install=False, **kw)
    fit(l, 8, cbs=[cb, lawa, spy])
    ends = [*ends]
    assert [*lawa.fit_state.cycles.ends]==ends
    with quiet(l):
        if isinstance(cb, SWA): cb.restore(l)
        lawa.apply(l)
    assert_close(l.model, spy.mean(ends[-2:]))
    if isinstance(cb, Ensemble): assert set(lawa.collected)<=set(cb.collected)

def test_beside_those_who_set_cycles_at_places_that_were_asked_for():
    lawa = LAWA(3, every=1, install=False)
    fit(learner(), 4, cbs=[SnapshotEnsemble(2), lawa])
    assert lawa.collected==[10,15,20]

@pytest.mark.parametrize('method,kw', [('fit_one_cycle',{}), ('fit_flat_cos',{}), ('fine_tune',dict(freeze_epochs=2))])
def test_ways_to_fit(method, kw):
    l,spy,lawa = learner(splitter=two_groups),Spy(),LAWA(3, every=1)
    fit(l, 5, method=method, cbs=[lawa, spy], **kw)
    assert lawa.n_averaged==3 and lawa.collected==[15,20,25] and len(spy.ws)==25
    assert_close(l.model, spy.mean([15,20,25]))

def test_model_without_batchnorm_and_attached_to_the_learner():
    lawa = LAWA(2, every=1)
    l,spy = learner(plain_net(), cbs=lawa),Spy()
    fit(l, 3, cbs=spy)
    assert_close(l.model, spy.mean([10,15]))
    with quiet(l):
        l.validate()
        lawa.restore(l)
    fit(l, 2, cbs=spy)
    assert lawa.collected==[5,10]                            # a new fit, a new window
    assert_close(l.model, spy.mean([5,10]))

# ---- it only looks

def test_the_walk_is_the_same_to_the_bit():
    a,s,t = learner(net(.3)),Spy(),Spy()
    fit(a, 4, method='fit_one_cycle', cbs=s)
    b = learner(net(.3))
    fit(b, 4, method='fit_one_cycle', cbs=[LAWA(3, every=.4, eval_every=1), t])
    assert s.lrs==t.lrs and all(map(same, s.ws, t.ws)) and rng_fingerprint(a)==rng_fingerprint(b)

class Walk(Spy):
    "Also where a validation begins in the fit"
    def before_fit(self):
        if not self.learn.lock.locked(): super().before_fit()

def test_validations_in_a_fit_and_after_it_are_no_snapshots():
    class Extra(Callback):
        "Validates when an epoch has ended, and in the middle of one where a snapshot is due"
        order,run_valid = 200,False
        def after_batch(self):
            if self.learn.training and self.learn.iter==1: self.look()
        def after_epoch(self): self.look()
        def look(self):
            l = self.learn
            if l.lock.locked(): return
            kept = {k:getattr(l, k) for k in ('dl','iter','n_iter','training','epoch','pct_train','train_iter')}
            with quiet(l): l.validate()
            for k,v in kept.items(): setattr(l, k, v)
            l.model.train(l.training)
    l,spy,lawa = learner(plain_net()),Walk(),LAWA(4, every=.4)
    fit(l, 3, cbs=[lawa, Extra(), spy])
    assert lawa.collected==[9,11,13,15] and lawa.n_averaged==4
    assert_close(l.model, spy.mean([9,11,13,15]))
    with quiet(l):
        lawa.restore(l)
        l.validate()
        l.get_preds()
    assert lawa.n_averaged==4 and len(lawa._average.weights.window)==4

def test_frozen_weights_are_as_they_were():
    l = learner(splitter=two_groups)
    l.freeze_to(1)
    before = weights(l.model[0])
    fit(l, 4, cbs=LAWA(3, every=1))
    assert same(weights(l.model[0]), before)

def test_half_precision_model():
    class Half(Callback):
        order = 5
        def before_batch(self): self.learn.xb = (self.learn.xb[0].bfloat16(),)
        def after_pred(self): self.learn.pred = self.learn.pred.float()
    l,spy,lawa = learner(net().bfloat16(), opt_func=SGD),Spy(),LAWA(3, every=1)
    fit(l, 5, cbs=[lawa, spy, Half()])
    assert all(p.dtype==torch.bfloat16 for p in l.model.parameters())
    assert_close(lawa._average.weights.average, spy.mean([15,20,25]))
    lawa.restore(l)
    assert same(weights(l.model), spy.ws[-1])

def test_snapshots_that_are_no_numbers_are_left_out():
    class Spoil(Callback):
        order,run_valid = 20,False
        def after_step(self):
            with torch.no_grad():
                if self.learn.train_iter==14: self.learn.model[0].weight[0] = math.nan
    l,spy,lawa = learner(),Spy(),LAWA(3, every=.4)
    with pytest.warns(UserWarning, match='not finite'): fit(l, 4, cbs=[lawa, Spoil(), spy])
    assert lawa.collected==[10,12,14] and lawa.n_averaged==3
    assert_close(l.model, spy.mean([10,12,14]))

# ---- columns, and the best of them

def test_columns_are_an_evaluation_of_the_average_of_that_moment():
    class Copies(Callback):
        order = 200
        def before_fit(self): self.models = []
        def after_epoch(self): self.models.append(self.learn.lawa.lawa_model)
    l,spy,copies,lawa = learner(),Spy(),Copies(),LAWA(3, every=1, eval_every=1)
    fit(l, 5, cbs=[lawa, spy, copies])
    assert l.recorder.metric_names[4:]==['lawa_loss','lawa_accuracy','time']
    for e,(row,m) in enumerate(zip(l.recorder.values, copies.models, strict=True), 1):
        assert_close(m, spy.mean([5*i for i in range(max(1, e-2), e+1)]))
        other = learner(m)
        with quiet(other): np.testing.assert_allclose(other.validate(), row[3:5], rtol=1e-5)
    last = [*l.recorder.values[-1][3:5]]
    with quiet(l): np.testing.assert_allclose(l.validate(), last, rtol=1e-6)

def test_a_window_of_one_has_the_weights_with_measured_statistics():
    l,lawa,one = learner(),LAWA(3, eval_every=1),LAWA(1, every=1, eval_every=1, install=False)
    fit(l, 4, cbs=[lawa, one])
    last = dict(zip(l.recorder.metric_names[1:], l.recorder.values[-1]))
    with quiet(l): df = lawa.compare(l)
    np.testing.assert_allclose(df.loss.iloc[1:], [last['lawa2_loss'],last['lawa_loss']], rtol=1e-6)

class Made(Callback):
    "The lawa_loss of each epoch, made up"
    order = Recorder.order+1
    def __init__(self, vals): self.vals = vals
    def after_epoch(self):
        rec = self.learn.recorder
        rec.values[-1][rec.metric_names.index('lawa_loss')-1] = self.vals[self.learn.epoch]

def test_the_best_average_and_a_walk_that_goes_on(tmp_path):
    l,spy,lawa = learner(path=tmp_path),Spy(),LAWA(3, every=1, eval_every=1)
    fit(l, 6, cbs=[lawa, SaveModelCallback(monitor='lawa_loss'), Made([9.,5.,4.,1.,2.,3.]), spy])
    best = spy.mean([10,15,20])
    assert_close(l.model, best)
    assert lawa.collected==[10,15,20] and lawa.n_averaged==3
    lawa.save(tmp_path/'lawa')
    other = learner(s=1)
    with quiet(other): LAWA(3).load(tmp_path/'lawa').apply(other)
    assert same(weights(other.model), weights(l.model))
    first,more = spy.ws,Spy()
    fit(l, 7, start_epoch=6, cbs=[lawa, more])               # the walk goes on from its last weights, with its last three
    ws = first+more.ws
    assert lawa.collected==[25,30,35] and lawa.n_averaged==3
    assert_close(l.model, by_hand([ws[i-1] for i in (25,30,35)], 3))

def test_the_best_average_before_the_window_is_full(tmp_path):
    l,spy,lawa = learner(path=tmp_path),Spy(),LAWA(4, every=1, eval_every=1)
    fit(l, 6, cbs=[lawa, SaveModelCallback(monitor='lawa_loss'), Made([9.,1.,4.,5.,2.,3.]), spy])
    assert_close(l.model, spy.mean([5,10]))
    assert lawa.collected==[5,10] and lawa.n_averaged==2

# ---- beside others

def test_only_watching_beside_swa():
    l,spy,swa,lawa = learner(),Spy(),SWA(start=1, cycle_len=1),LAWA(2, every=1, install=False, eval_every=1)
    fit(l, 5, cbs=[lawa, swa, spy])
    assert_close(l.model, spy.mean([10,15,20,25]))
    row = dict(zip(l.recorder.metric_names[1:], l.recorder.values[-1]))
    with quiet(l):
        swa.restore(l)
        lawa.apply(l)
        np.testing.assert_allclose(l.validate()[0], row['lawa_loss'], rtol=1e-6)
        assert_close(l.model, spy.mean([20,25]))
        lawa.restore(l)
    assert same(weights(l.model), spy.ws[-1])
    with pytest.raises(ValueError, match=r'SWA and LAWA callbacks.*LAWA\(install=False\)'): fit(learner(), 2, cbs=[SWA(), LAWA()])

def test_what_it_answers():
    l,spy,lawa = learner(),Spy(),LAWA(2, every=1)
    fit(l, 3, cbs=[lawa, spy])
    assert same(state(lawa.lawa_model), state(l.model)) and repr(lawa)=='LAWA(n_averaged=2)' and 'smaller k' in lawa.why_worse()
    with pytest.raises(TypeError, match=r'lawa.apply\(learn\)'): lawa.apply(None)
    ax = lawa.plot_sched()
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['weights collected (2)']
    assert not np.isnan(ax.lines[0].get_ydata().astype(float)).any()      # nobody's rate jumps here

# ---- stopping and going on

class Seeds(Callback):
    "Each epoch is the same one in every process"
    order = -100
    def before_epoch(self):
        seed(self.learn.epoch)
        self.learn.dls.train.rng = random.Random(self.learn.epoch)

class Stop(Callback):
    order = 200
    def __init__(self, epoch): self.stop_at = epoch
    def after_epoch(self):
        if self.learn.epoch!=self.stop_at: return
        self.learn.save('m')
        raise KeyboardInterrupt('stop')

def go_on(path, epoch, first, then):
    "A fit of 6 epochs that was stopped after `epoch`, in another process"
    l = learner(path=path)
    with pytest.raises(KeyboardInterrupt): fit(l, 6, cbs=[LAWA(save_to=path/'e', **first), Seeds(), Stop(epoch)])
    again = learner(path=path, s=1)
    again.create_opt()
    again.load('m')
    got = LAWA(**then).load(path/'e')
    fit(again, 6, start_epoch=epoch+1, cbs=[got, Seeds()])
    return again,got

@pytest.mark.parametrize('kw', [dict(k=3, every=1), dict(k=4, every=.4), dict(k=5)])
@pytest.mark.parametrize('epoch', [0, 3, 5])
def test_a_resumed_fit_has_the_window_of_one_that_was_not_stopped(kw, epoch, tmp_path):
    whole,want = learner(),LAWA(**kw)
    fit(whole, 6, cbs=[want, Seeds()])
    again,got = go_on(tmp_path, epoch, kw, kw)
    assert same(weights(whole.model), weights(again.model)) and got.n_averaged==want.n_averaged and got.collected==want.collected
    if epoch<5: assert same(state(whole.model), state(again.model))       # later the statistics are of other batches
    assert all(a==b and same(v,w) for (a,v),(b,w) in zip(got._average.weights.window, want._average.weights.window, strict=True))

def test_going_on_with_another_k(tmp_path):
    whole = learner()
    fit(whole, 6, cbs=[LAWA(2, every=1), Seeds()])
    again,got = go_on(tmp_path, 3, dict(k=4, every=1), dict(k=2, every=1))
    assert same(state(whole.model), state(again.model)) and got.collected==[25,30]
    with pytest.raises(ValueError, match='the last 4 snapshots, k=7 needs earlier ones: use k=4'): go_on(tmp_path, 3, dict(k=4, every=1), dict(k=7, every=1))

def test_files_are_of_one_kind(tmp_path):
    for cls,other in (LAWA,SWA),(LAWA,EMA),(EMA,LAWA):
        cb = cls()
        fit(learner(), 3, cbs=cb)
        cb.save(tmp_path/'f')
        with pytest.raises(ValueError, match=f'not the state of an {other.__name__} callback: it is that of a callback of another kind'): other().load(tmp_path/'f')
    LAWA().save(tmp_path/'f')
    l,lawa = learner(),LAWA(2, every=1).load(tmp_path/'f')       # without an average yet
    fit(l, 2, cbs=lawa)
    assert lawa.collected==[5,10]

def test_copy_to_after_load(tmp_path):
    l,lawa = learner(),LAWA(3)
    fit(l, 3, cbs=lawa)
    lawa.save(tmp_path/'f')
    got = LAWA(3).load(tmp_path/'f').copy_to(net())
    for k in 'weight','bias','running_mean','running_var': assert torch.equal(got.state_dict()[f'1.{k}'], l.model.state_dict()[f'1.{k}'])
    assert same(weights(got), weights(l.model))

# ---- arguments

@pytest.mark.parametrize('kw,exc,match', [(dict(k=0),ValueError,'k=0: give a positive number of snapshots'), (dict(k=2.5),TypeError,'k=2.5'), (dict(k=None),TypeError,'k=None'),
    (dict(every=0),ValueError,'every'), (dict(every=-1),ValueError,'every'), (dict(every='x'),TypeError,'every'), (dict(every=math.nan),ValueError,'every'),
    (dict(start=1.5),ValueError,'start'), (dict(start=-1),ValueError,'start'), (dict(eval_every=-1),ValueError,'eval_every'),
    (dict(window=5),TypeError,r'LAWA\(window=...\): it has no parameter window. It takes k, every, start,')])
def test_bad_arguments(kw, exc, match):
    with pytest.raises(exc, match=match): LAWA(**kw)

def test_longer_than_the_fit():
    l = learner()
    before = state(l.model)
    with pytest.raises(ValueError, match=r'every=3 epochs is more than the 2 that start=0.0 leaves of 2'): fit(l, 2, cbs=LAWA(every=3))
    assert same(state(l.model), before)
    with pytest.warns(UserWarning, match='never start'): fit(l, 2, cbs=LAWA(start=2))

def test_numbers_of_numpy():
    lawa = LAWA(np.int64(3), np.float32(.5), np.float64(.5))
    assert (type(lawa.k),type(lawa.every),type(lawa.start))==(int,float,float)
