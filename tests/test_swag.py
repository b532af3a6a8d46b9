"SWAG: mean, variance and deviations of a walk by hand, what is drawn from them, statistics of each sample; calibration"
import math, random
from copy import deepcopy

import pytest, torch
from common import *
from fastai.callback.training import BnFreeze
from sklearn.calibration import calibration_curve
from fastswa.all import *
from fastswa.average import WeightAverage
from fastswa.calibration import ece, nll, plot_reliability
from fastswa.swag import SWAG, SWAGAverage, Samples

# ---- a walk by hand

def walk(n=6, shapes=((2,3),(2,)), s=0):
    "Weights of `n` places: float64 tensors of each shape"
    g = torch.Generator().manual_seed(s)
    return [[torch.randn(o, generator=g, dtype=torch.float64)+2 for o in shapes] for _ in range(n)]

def put(model, ws):
    with torch.no_grad():
        for p,w in zip(model.parameters(), ws, strict=True): p.copy_(w)

def walked(ws, K=20, model=None):
    m = nn.Linear(3,2) if model is None else model
    avg = SWAGAverage(m, K)
    for w in ws: put(m, w); avg.update(m)
    return avg

def flat(ws): return torch.cat([torch.view_as_real(w).reshape(-1).double() if w.is_complex() else w.reshape(-1).double() for w in ws])

def by_hand(ws, K):
    "Mean, diagonal and low-rank part of the covariance as the paper's algorithm 1 and equation 1 have them, in float64"
    x = torch.stack([flat(w) for w in ws])
    mean,s = x.mean(0),(x**2).mean(0)-x.mean(0)**2
    D = torch.stack([x[i]-x[:i+1].mean(0) for i in range(len(x))])[-K:]
    return mean,s.clamp_min(0)/2,D.T@D/(2*max(len(D)-1, 1)),D

def moments(avg, n=3000, **kw):
    x = torch.stack([flat(avg.draw(k, **kw)) for k in range(n)])
    return x.mean(0),x.T.cov()

def assert_drawn_from(avg, mean, cov, n=3000, **kw):
    "Within five standard errors of a mean, and of a covariance of Gaussians"
    got_mean,got = moments(avg, n, **kw)
    v = cov.diag()
    assert ((got_mean-mean).abs()<=5*(v/n).sqrt()+1e-6).all()
    assert ((got-cov).abs()<=5*((v[:,None]*v+cov**2)/n).sqrt()+1e-6).all()

@pytest.mark.parametrize('n,K', [(6,3), (6,6), (4,20), (7,1), (2,5)])
def test_mean_variance_and_deviations_of_a_walk(n, K):
    ws = walk(n)
    avg,(mean,half,_,D) = walked(ws, K),by_hand(ws, K)
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
    close(flat(avg.average), mean)
    close(flat(avg.var)/2, half)
    assert len(avg.devs)==min(n, K)
    close(torch.stack([flat(d) for d in avg.devs]), D)

@pytest.mark.parametrize('n,K,scale', [(6,3,1.), (6,6,2.), (4,20,1.), (7,1,.5)])
def test_samples_have_the_papers_mean_and_covariance(n, K, scale):
    "K smaller than the walk, as long, larger (then by the deviations that exist), and a single one"
    ws = walk(n)
    mean,half,low,_ = by_hand(ws, K)
    assert_drawn_from(walked(ws, K), mean, scale*(half.diag()+low), scale=scale)

def test_the_divisor_counts_the_deviations_that_exist():
    "torch-uncertainty and the authors' code divide by K-1 from the beginning: with 4 of 20, a sixth of the covariance"
    ws = walk(4)
    avg = walked(ws, 20)
    avg.var = [v*0 for v in avg.var]
    _,_,low,_ = by_hand(ws, 4)
    torch.testing.assert_close(moments(avg)[1].trace(), low.trace(), rtol=.05, atol=0)

def test_the_same_z2_for_all_layers():
    "Which is what makes the deviations directions of the whole network: torch-uncertainty draws one for each tensor"
    ws = walk(3)
    avg = walked(ws, 1)
    avg.var = [v*0 for v in avg.var]
    dev = flat(avg.devs[0])
    for k in range(5):
        moved = flat(avg.draw(k))-flat(avg.average)
        torch.testing.assert_close((moved@dev).abs(), moved.norm()*dev.norm(), rtol=1e-5, atol=0)

def test_scale_is_of_the_variance_and_of_both_parts():
    "dice scales the standard deviation, and leaves the low-rank part alone"
    for part in 'both','var','devs':
        avg = walked(walk(6), 3)
        if part=='var': avg.devs = [[d*0 for d in ds] for ds in avg.devs]
        if part=='devs': avg.var = [v*0 for v in avg.var]
        one,four,none = (flat(avg.draw(7, scale=s))-flat(avg.average) for s in (1,4,0))
        torch.testing.assert_close(four, 2*one, rtol=1e-4, atol=1e-5)
        assert one.abs().max()>.1 and not none.any()

def test_one_snapshot_has_no_spread():
    avg = walked(walk(1))
    for o in avg.draw(0, scale=100.),avg.draw(1): assert same(o, avg.average)

def test_weights_that_do_not_move_are_in_all_samples_to_the_bit():
    "var_clamp=1e-6 of torch-uncertainty makes a standard deviation of .001 of these"
    ws = walk(9)
    for w in ws: w[1] = torch.tensor([.1,-1234.567], dtype=torch.float64)
    avg = walked(ws, 4)
    assert not avg.var[1].any() and not any(d[1].any() for d in avg.devs)
    for k in range(3): assert torch.equal(avg.draw(k)[1], ws[-1][1].float())

def test_variance_far_from_zero():
    "m2-mean^2 in float32 is off by more than the variance here, and may be below 0"
    ws = [[w*1e-3+1000 for w in o] for o in walk(20)]
    ws = [[w.float() for w in o] for o in ws]
    avg = walked(ws, 3)
    x = torch.stack([flat(w) for w in ws])
    torch.testing.assert_close(flat(avg.var), x.var(0, unbiased=False), rtol=.05, atol=0)    # the mean itself is rounded to 6e-5
    naive = (x.float()**2).mean(0)-x.float().mean(0)**2
    assert (naive.double()/x.var(0, unbiased=False)-1).abs().max()>1

def test_infinite_weights_stay():
    ws = [[torch.tensor([-math.inf, float(i)])] for i in range(4)]
    class M(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(2))
    avg = walked(ws, 3, M())
    for k in range(3):
        w, = avg.draw(k)
        assert w[0]==-math.inf and w[1].isfinite()

def test_complex_weights():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    ws = [[torch.view_as_complex(w)] for w, in walk(5, [(2,2)])]
    mean,half,low,_ = by_hand(ws, 3)
    assert_drawn_from(walked(ws, 3, M()), mean, half.diag()+low, 5000)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    ws = [[w.to(dtype) for w in o] for o in walk(8)]
    avg,(mean,half,_,D) = walked(ws, 3, nn.Linear(3,2).to(dtype)),by_hand(ws, 3)
    assert {o.dtype for o in (*avg.average, *avg.var, *sum(avg.devs, []), *avg.draw(0))}=={torch.float32}
    torch.testing.assert_close(flat(avg.var)/2, half, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat(avg.devs[-1]), D[-1], atol=1e-5, rtol=1e-5)
    with_mean = flat(avg.draw(3))
    avg.apply(avg.model)                                     # rounded in the model, and exact for samples
    assert torch.equal(flat(avg.draw(3)), with_mean)

def test_a_model_that_is_converted_on_the_way():
    ws,m = walk(6),nn.Linear(3,2)
    avg = SWAGAverage(m, 4)
    for k,w in enumerate(ws):
        if k==3: m.double()
        put(m, w); avg.update(m)
    mean,half,_,D = by_hand(ws, 4)
    torch.testing.assert_close(flat(avg.var)/2, half, atol=1e-6, rtol=1e-6)
    assert {o.dtype for o in (*avg.draw(0), *avg.var)}=={torch.float64}

def test_state_goes_on_to_the_bit():
    ws = walk(9)
    whole,half = walked(ws[:7], 4),walked(ws[:5], 4)
    m = nn.Linear(3,2)
    for K in 4,2:
        on = SWAGAverage(m, K)
        on.load_state_dict(half.state_dict())
        assert len(on.devs)==K
        for w in ws[5:7]: put(m, w); on.update(m)
        assert same(on.average, whole.average) and same(on.var, whole.var) and len(on.devs)==K
        assert all(map(same, on.devs, whole.devs[-K:]))
    empty = SWAGAverage(m)
    empty.load_state_dict(SWAGAverage(m).state_dict())
    assert empty.n==0 and not empty.devs

def test_states_that_are_none():
    good,m = walked(walk(3)).state_dict(),nn.Linear(3,2)
    avg = SWAGAverage(m)
    plain = WeightAverage(m); plain.update(m)
    nan = [good['spread'][0], {k:v*math.nan for k,v in good['spread'][1].items()}]
    for bad,match in (plain.state_dict(),'no variances'), (dict(good, spread=[]),'no variances'), (dict(good, spread=nan),'no variances'), (dict(good, spread=[{'x':torch.ones(1)}]*3),'another model'):
        with pytest.raises(ValueError, match=match): avg.load_state_dict(bad)
        assert avg.n==0

# ---- the callback

def fitted(l=None, n=4, K=3, **kw):
    l = learner() if l is None else l
    swag,spy = SWAG(K, **{**dict(start=1, cycle_len=.6), **kw}),Spy()
    fit(l, n, cbs=[swag, spy])
    return l,swag,spy

def outputs(model):
    model.eval()
    with torch.no_grad(): return model(X[200:300]).softmax(1)

def test_collects_what_swa_collects_and_each_place_once():
    "Not the first weights (lightning-uq-box), and the first snapshot once (torch-uncertainty counts it twice)"
    l,swag,spy = fitted(eval_every=1)
    ref = SWA(start=1, cycle_len=.6)
    fit(other := learner(), 4, cbs=ref)
    assert swag.collected==ref.collected==[8,11,14,17,20] and swag.n_averaged==5
    assert same(state(l.model), state(other.model)) and l.recorder.metric_names[4:6]==['swag_loss','swag_accuracy']
    mean,half,_,D = by_hand([spy.ws[i-1] for i in swag.collected], 3)
    w = swag._average.weights
    torch.testing.assert_close(flat(w.average), mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flat(w.var)/2, half, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(torch.stack([flat(d) for d in w.devs]), D, atol=1e-6, rtol=1e-5)

def test_a_validation_collects_nothing():
    "Where torch-uncertainty collects"
    class Again(Callback):
        order,run_valid = 200,False
        def after_epoch(self): self.learn.validate() if not self.learn.lock.locked() else None
    l,swag,_ = fitted()
    other,more = learner(),SWAG(3, start=1, cycle_len=.6)
    fit(other, 4, cbs=[more, Again()])
    with quiet(other): other.validate(); other.get_preds(); more.compare(other)
    assert more.collected==swag.collected and more.n_averaged==swag.n_averaged

def test_the_same_walk():
    a,b,s,t,nets = learner(),learner(),Spy(),Spy(),[]
    class Ask(Callback):
        order,run_valid = 200,False
        def after_train(self):
            if self.learn.swag.n_averaged: nets.append(self.learn.swag.sample(self.learn, 0))
    fit(a, 3, cbs=s)
    fit(b, 3, cbs=[SWAG(start=0, cycle_len=.4, swa_lr=False, install=False, eval_every=1), t, Ask()])
    assert all(map(same, s.ws, t.ws)) and same(state(a.model), state(b.model)) and rng_fingerprint(a)==rng_fingerprint(b) and len(nets)==3

def test_several_groups():
    l,swag,spy = fitted(learner(splitter=two_groups))
    mean,half,_,_ = by_hand([spy.ws[i-1] for i in swag.collected], 3)
    torch.testing.assert_close(flat(swag._average.weights.var)/2, half, atol=1e-7, rtol=1e-4)
    with quiet(l): assert len(swag.validate(l, 2))==2

def test_frozen_group():
    l = learner(splitter=two_groups)
    l.freeze()
    before = weights(l.model[0])
    _,swag,_ = fitted(l)
    for k in range(2): assert same(weights(swag.sample(l, k)[0]), before)

# ---- networks drawn after a fit

def drawn(swag, l, n=3, seed=0, exact=False):
    "Probabilities of each of `n` networks, by hand"
    res = []
    for st in Samples(swag, l, n, seed, exact):
        m = net()
        m.load_state_dict(st, strict=False)
        res.append(outputs(m))
    return torch.stack(res)

def test_predictions_are_the_mean_of_those_of_networks_drawn():
    l,swag,_ = fitted()
    ps = drawn(swag, l)
    with quiet(l):
        got,targs = swag.get_preds(l, 3)
        loss,acc = swag.validate(l, 3)
        torch.testing.assert_close(swag.get_preds(l, 1, seed=9)[0], outputs(swag.sample(l, 9)))
    torch.testing.assert_close(got, ps.mean(0), atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose([loss,acc], [nll(ps.mean(0), targs), (ps.mean(0).argmax(1)==targs).float().mean()], rtol=1e-5)
    assert (ps[0]-ps[1]).abs().max()>1e-4

def test_predict():
    import pandas as pd
    from fastai.tabular.all import TabularDataLoaders, tabular_learner
    seed()
    df = pd.DataFrame(dict(x=np.random.randn(120), y=np.random.randn(120)))
    df['z'] = np.where(df.x>df.y, 'a', 'b')
    data = TabularDataLoaders.from_df(df, cont_names=['x','y'], y_names='z', bs=20, valid_idx=range(20), device='cpu')
    l = tabular_learner(data, layers=[8], n_out=2)
    _,swag,_ = fitted(l)
    with quiet(l):
        probs = swag.predict(l, df.iloc[0], 4)[2]
        torch.testing.assert_close(probs, swag.get_preds(l, 4)[0][0], atol=1e-6, rtol=1e-5)

def test_the_same_seed_the_same_networks_whatever_else_is_drawn():
    l,swag,_ = fitted()
    with quiet(l):
        was = rng_fingerprint(l)
        swag.sample(l, 0); swag.sample(l)
        assert rng_fingerprint(l)==was
        first = swag.get_preds(l, 2)[0]
        again = []
        for k in range(2):
            seed(k+5)
            list(l.dls.train)                                # its own stream goes on
            again.append(swag.get_preds(l, 2)[0])
        assert same([first,first], again)
        assert not torch.equal(swag.get_preds(l, 2, seed=1)[0], first)
        for exact in True,False:
            net = state(swag.sample(l, 3, exact))
            list(l.dls.train)
            assert same(state(swag.sample(l, 3, exact)), net)
        assert not same(weights(swag.sample(l)), weights(swag.sample(l)))

def test_the_learner_is_left_alone_and_the_mean_in_or_out():
    l,swag,_ = fitted()
    l.model.train()
    was = state(l.model)
    with quiet(l):
        inside = swag.get_preds(l, 2)[0]
        net = swag.sample(l, 0)
        assert same(state(l.model), was) and swag._average.weights.is_applied()
        assert not same(weights(net), weights(l.model)) and not net.training
        swag.restore(l)
        last = state(l.model)
        assert torch.equal(swag.get_preds(l, 2)[0], inside) and same(state(l.model), last)
        swag.apply(l)
    fit(l, 1)
    with pytest.raises(RuntimeError, match='the mean is gone'): swag.get_preds(l, 2)

def test_one_network_at_a_time_is_in_memory(monkeypatch):
    import weakref
    from fastswa import swag as room
    alive,most = [],[]
    def watched(*args, **kw):
        m = make_member(*args, **kw)
        alive.append(weakref.ref(m['state']['0.weight']))
        most.append(sum(o() is not None for o in alive))
        return m
    make_member = room.make_member
    l,swag,_ = fitted()
    monkeypatch.setattr(room, 'make_member', watched)
    with quiet(l): swag.get_preds(l, 5)
    assert most==[1]*5

def test_an_interrupt_leaves_the_model_as_it_was():
    class Stop(Callback):
        def after_pred(self): raise KeyboardInterrupt
    l,swag,_ = fitted()
    was = state(l.model)
    with quiet(l), pytest.raises(KeyboardInterrupt): swag.get_preds(l, 2, cbs=Stop())
    assert same(state(l.model), was)

# ---- statistics of each network

def ordered(n=200, **kw): return learner(n=n, shuffle=False, drop_last=False, **kw)

def bn_of(m): return [o for l in m.modules() if isinstance(l, nn.BatchNorm2d) for o in (l.running_mean,l.running_var)]

def measured(m, xs, bs=40):
    "Statistics of `m` over all of `xs`, measured outside of any learner"
    m = deepcopy(m).train()
    for o in bn_of(m): o.fill_(7)
    return bn_of(update_bn(m, xs.split(bs)))

def test_each_network_has_statistics_of_its_own():
    "It has been nowhere, and none of its own are in the model"
    l,swag,_ = fitted(ordered())
    for exact in True,False:
        nets = [swag.sample(l, k, exact) for k in range(2)]
        for m in nets:
            for a,b in zip(bn_of(m), measured(m, X[:200])): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not same(bn_of(nets[0]), bn_of(nets[1])) and not same(bn_of(nets[0]), bn_of(l.model))

def test_exact_is_all_training_data_and_else_some_2000_items():
    data = list(zip(X,Y))*2
    l = learner(data=DataLoaders(FastaiDataLoader(data, bs=150), FastaiDataLoader(data[:64], bs=64)))
    _,swag,_ = fitted(l, n=1, start=0, cycle_len=.25, check=False)
    xs = torch.cat([X,X])
    for exact,n in (False,2100),(True,len(xs)):
        net = swag.sample(l, 0, exact)
        with torch.no_grad(): acts = net[0](xs[:n])
        torch.testing.assert_close(net[1].running_mean, acts.mean((0,2,3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(net[1].running_var, acts.var((0,2,3), unbiased=False), rtol=1e-4, atol=1e-6)

def test_frozen_layers_keep_their_statistics():
    l = learner(cbs=BnFreeze())
    for p in l.model[1].parameters(): p.requires_grad_(False)
    l.model[1].running_mean.fill_(.3)
    _,swag,_ = fitted(l)
    for exact in True,False:
        net = swag.sample(l, 0, exact)
        assert same(bn_of(net)[:2], bn_of(l.model)[:2]) and not same(bn_of(net)[2:], bn_of(l.model)[2:])

def test_without_batchnorm():
    l,swag,_ = fitted(learner(plain_net()))
    with quiet(l): assert torch.equal(swag.get_preds(l, 3)[0], swag.get_preds(l, 3, exact=True)[0])

def test_without_training_data():
    l,swag,_ = fitted()
    l.dls.loaders[0] = l.dls.train.new([])
    with pytest.raises(ValueError, match='need training data'): swag.get_preds(l)

# ---- saved, loaded, gone on with; out of snapshots

def test_saved_and_loaded(tmp_path):
    l,swag,_ = fitted()
    swag.save(tmp_path/'s')
    other = learner(model=nn.Sequential(*net()), s=0)
    again = SWAG(3).load(tmp_path/'s')
    with quiet(l), quiet(other):
        want = swag.get_preds(l, 2)[0]
        seed(0)
        torch.testing.assert_close(again.get_preds(other, 2)[0], want)
        with pytest.raises(ValueError, match='made for another model'): swag.get_preds(other, 2)
    with pytest.raises(ValueError, match='of another kind'): SWA().load(tmp_path/'s')
    (ref := SWA()).load_state_dict(dict(swag.state_dict(), kind='swa'))
    ref.save(tmp_path/'t')
    with pytest.raises(ValueError, match='of another kind'): SWAG().load(tmp_path/'t')

def test_a_resumed_fit_ends_as_one_that_was_not_stopped(tmp_path):
    class Seeds(Callback):
        order = -100
        def before_epoch(self):
            seed(self.learn.epoch)
            self.learn.dls.train.rng = random.Random(self.learn.epoch)
    class Stop(Callback):
        order = 200
        def after_epoch(self):
            if self.learn.epoch==3:
                self.learn.save('m')
                raise KeyboardInterrupt('stop')
    kw = dict(K=8, start=1, cycle_len=.4)
    whole,want = learner(),SWAG(**kw)
    fit(whole, 6, cbs=[want, Seeds()])
    with pytest.raises(KeyboardInterrupt): fit(learner(path=tmp_path), 6, cbs=[SWAG(save_to=tmp_path/'e', **kw), Seeds(), Stop()])
    again,got = learner(path=tmp_path, s=1),SWAG(**kw).load(tmp_path/'e')
    again.create_opt()
    again.load('m')
    fit(again, 6, start_epoch=4, cbs=[got, Seeds()])
    a,b = (o._average.weights for o in (want,got))
    assert same(state(whole.model), state(again.model)) and want.n_averaged==got.n_averaged>4
    assert same(a.var, b.var) and len(b.devs)==8 and all(map(same, a.devs, b.devs))
    for k in range(2): assert same(a.draw(k), b.draw(k))

def test_out_of_snapshots():
    "An FGE beside SWA has the weights that it averages as members: both make the same SWAG"
    l,fge = learner(),FGE()
    swag,_ = SWAG(3, start=1, cycle_len=.6),fge
    fit(l, 4, cbs=[swag, fge])
    was = state(l.model)
    made = SWAG.from_snapshots(fge, l, K=3, scale=2.)
    assert same(state(l.model), was) and made.collected==swag.collected and (made.K,made.scale)==(3,2.)
    a,b = (o._average.weights for o in (swag,made))
    assert same(a.average, b.average) and same(a.var, b.var) and all(map(same, a.devs, b.devs))
    made.scale = 1.
    with quiet(l):
        torch.testing.assert_close(made.get_preds(l, 2)[0], swag.get_preds(l, 2)[0])
        swag.restore(l)
        made.apply(l)                                        # the mean, with statistics measured now
        torch.testing.assert_close(outputs(l.model), outputs(swag.swa_model), atol=1e-5, rtol=1e-4)
    with pytest.raises(TypeError, match='give Snapshots or an ensemble, not SWA'): SWAG.from_snapshots(SWA(), l)
    with pytest.raises(ValueError, match='no members yet'): SWAG.from_snapshots(FGE(), l)

def test_the_best_average_is_what_samples_are_drawn_around(tmp_path):
    l,swag = learner(path=tmp_path),SWAG(3, start=0, cycle_len=.4, eval_every=1)
    fit(l, 4, cbs=[swag, SaveModelCallback(monitor='swag_loss')])
    moved = [(a-b).abs().max() for a,b in zip(swag.sample(l, 0).parameters(), l.model.parameters())]
    assert same(swag._average.weights.average, weights(l.model)) and max(moved)<1

# ---- arguments

@pytest.mark.parametrize('kw,exc,match', [(dict(K=0),ValueError,'K=0: give a positive number of deviations'), (dict(K=1.5),TypeError,'K=1.5'), (dict(scale=-1),ValueError,'scale'),
    (dict(scale='x'),TypeError,'scale'), (dict(start=2.),ValueError,'start'), (dict(start='auto'),ValueError,'of one walk'), (dict(rank=3),TypeError,r'SWAG\(rank=...\): it has no parameter rank. It takes K, scale, start')])
def test_bad_arguments(kw, exc, match):
    with pytest.raises(exc, match=match): SWAG(**kw)

def test_bad_questions():
    l,swag,_ = fitted()
    for f,exc,match in [(lambda: swag.get_preds(l, 0),ValueError,'n=0: give a positive number of samples'), (lambda: swag.get_preds(l, l.dls.valid),TypeError,'n='), (lambda: swag.get_preds(l, seed='a'),TypeError,'seed'),
            (lambda: swag.get_preds(None),TypeError,'give it the learner'), (lambda: SWAG().get_preds(l),RuntimeError,'nothing has been averaged yet')]:
        with pytest.raises(exc, match=match): f()

# ---- calibration

def made_up(n=20000, classes=3):
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(n, classes, generator=g)*1.5).softmax(1)
    return p,torch.multinomial(p, 1, generator=g)[:,0]

def test_perfectly_calibrated():
    "Up to the sampling error of each bin: the mean of |N(0, p(1-p)/n)| is sqrt(2/pi) of its deviation"
    p,t = made_up()
    conf = p.max(1).values
    _,ns = np.unique(np.ceil(conf.numpy()*15), return_counts=True)
    expected = (2/math.pi)**.5*sum((n/len(p))*.5/n**.5 for n in ns)
    assert 0<ece(p, t)<2*expected<.03

def test_always_sure_and_right_every_second_time():
    p,t = torch.tensor([[.9,.1]]).repeat(10, 1),torch.tensor([0,1]*5)
    assert abs(ece(p, t)-.4)<1e-6 and abs(nll(p, t)+(math.log(.9)+math.log(.1))/2)<1e-6
    assert abs(ece(p, t, 1)-.4)<1e-6

def test_equals_torchs_loss_and_scikit_learns_curve():
    p,t = made_up(2000)
    assert abs(nll(p, t)-F.nll_loss(p.log(), t).item())<1e-6
    conf,hit = p.max(1)
    for bins in 5,15:
        acc,mean = calibration_curve(hit==t, conf, n_bins=bins)
        ax = plot_reliability({'a':p, 'b':p}, t, bins)
        np.testing.assert_allclose(ax.lines[1].get_xydata(), np.stack([mean, acc], 1), rtol=1e-6)
        assert [o.get_label() for o in ax.lines[1:]]==[f'{k} ECE {ece(p, t, bins):.3f}' for k in 'ab']
        n,_ = np.histogram(conf, np.linspace(0, 1, bins+1))
        assert abs(ece(p, t, bins)-(n[n>0]/len(p))@abs(acc-mean))<1e-6

def test_two_classes_in_one_column():
    p,t = made_up(500, 2)
    for one in p[:,1],p[:,1:],p[:,1].numpy(),p[:,1].tolist(): assert ece(one, t)==pytest.approx(ece(p, t), abs=1e-6) and nll(one, t)==pytest.approx(nll(p, t), abs=1e-6)
    assert ece(p[:,1:], t[:,None].float())==pytest.approx(ece(p, t), abs=1e-6)

def test_a_probability_of_0_is_no_infinity(): assert 80<nll([[1.,0.]], [1])<100 and ece([[1.,0.]], [1])==1

@pytest.mark.parametrize('p,t,match', [([[2.,-1.]],[0],'no probabilities'), ([[.5,.1]],[0],'no probabilities'), ([[math.nan,1.]],[0],'no probabilities'), ([[.5,.5]],[2],'from 0 to 1'), ([[.5,.5]],[.5],'from 0 to 1'),
    ([[.5,.5]],[0,1],'shape'), (np.zeros((0,2)),[],'shape'), (np.full((2,2,2), .5),[0,1],'shape')])
def test_what_has_no_calibration(p, t, match):
    for f in ece,nll,plot_reliability:
        with pytest.raises(ValueError, match=match): f(p, t)
    with pytest.raises(ValueError, match='n_bins'): ece([[.5,.5]], [0], 0)
