"Promise 11: whether it helped. `swa.compare`, and the check when a fit ends"
import warnings

import pytest, torch
from common import *
from fastswa import callback
from fastswa.callback import SWA
from fastswa.average import WeightAverage
from fastswa.compare import FairCheck, mean_and_error
from fastswa.ema import EMA
from fastswa.learner import score
from fastswa.model_average import ModelAverage

def worse(f):
    "The warnings that the average is worse"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f()
    return [w for w in ws if 'the average is worse' in str(w.message)]

def validate(l):
    with quiet(l): return list(l.validate())

def compare(swa, l, *args, **kw):
    with quiet(l): return swa.compare(l, *args, **kw)

# ---- compare

def measured(l, swa):
    "The three rows by hand"
    kept = state(l.model)
    swa.restore(l)
    rows = [validate(l)]
    own = state(l.model)
    with quiet(l): l.update_bn()
    rows.append(validate(l))
    l.model.load_state_dict(own)
    swa.apply(l)
    assert same(state(l.model), kept)
    return [*rows, validate(l)]

@pytest.mark.parametrize('extra', [[], [MixUp], [MixedPrecision], [GradientAccumulation]])
@pytest.mark.parametrize('inside', [True,False])
def test_compare_is_three_validations(extra, inside):
    l,swa = learner(net(.3), cbs=[o() for o in extra]),SWA(); fit(l, 4, cbs=swa)
    want = measured(l, swa)
    if not inside: swa.restore(l)
    with quiet(l):
        def found(): return rng_fingerprint(l),set(vars(l)),list(l.cbs)
        before,others = state(l.model),found()
        df = swa.compare(l)
        assert same(state(l.model), before) and found()==others and swa._average.applied==inside
    assert list(df.columns)==['loss','accuracy'] and list(df.index)==['last weights','last weights, statistics measured','average']
    np.testing.assert_allclose(df.values, want, rtol=1e-6)
    assert len({*df.loss})==3
    np.testing.assert_allclose(compare(swa, l).values, want, rtol=1e-6)
    swa.restore(l)
    np.testing.assert_allclose(validate(l), want[0], rtol=1e-6)

def test_compare_without_batchnorm_on_other_data_and_with_metrics_of_all_kinds():
    from fastai.metrics import F1Score
    l,swa = learner(plain_net(), metrics=[accuracy, F1Score(average='macro'), ValueMetric(lambda: 3., 'three')]),SWA(); fit(l, 4, cbs=swa)
    df = compare(swa, l)
    assert list(df.columns)==['loss','accuracy','f1_score'] and (df.iloc[0]==df.iloc[1]).all()
    other = dls(n_valid=64)[1]
    df = compare(swa, l, dl=other)
    with quiet(l): want = list(l.validate(dl=other))
    np.testing.assert_allclose(df.iloc[2], want[:3], rtol=1e-6)

def test_compare_needs_a_learner_and_an_average(tmp_path):
    with pytest.raises(TypeError, match='give it the learner'): SWA().compare()
    with pytest.raises(RuntimeError, match='pass this SWA to a fit first'): SWA().compare(learner())
    l,swa = learner(),SWA(); fit(l, 3, cbs=swa)
    swa.save(tmp_path/'a.pt')
    other = learner(s=3)
    before = state(other.model)
    df = compare(SWA().load(tmp_path/'a.pt'), other)             # a file knows the average
    assert same(state(other.model), before)
    np.testing.assert_allclose(df.iloc[2], validate(l), rtol=1e-6)
    fit(l, 1)
    now = state(l.model)
    with pytest.raises(RuntimeError, match='changed since'): compare(swa, l)
    assert same(state(l.model), now)

@pytest.mark.parametrize('k', [1,2,3,4,5])
def test_compare_interrupted(k):
    class Boom(Callback):
        n = 0
        def after_pred(self):
            Boom.n += not self.learn.training
            if Boom.n==k: raise KeyboardInterrupt
    l,swa = learner(),SWA(check=False); fit(l, 3, cbs=swa)
    before = state(l.model)
    with pytest.raises(KeyboardInterrupt):
        with quiet(l), l.added_cbs(Boom()): swa.compare(l)
    assert same(state(l.model), before) and swa._average.weights.is_applied()
    swa.restore(l)

@pytest.mark.parametrize('n_batches', [None,2,1])
def test_a_score_knows_the_items_of_each_batch(n_batches):
    l = learner()                                      # 100 validation items in batches of 64
    with quiet(l): meter = score(l, l.metrics, n_batches)
    assert meter.sizes==[64,36][:n_batches] and len(meter.losses)==len(meter.sizes)
    with torch.no_grad(): by_hand = l.loss_func(l.model.eval()(X[200:200+sum(meter.sizes)]), Y[200:200+sum(meter.sizes)])
    np.testing.assert_allclose([np.average(meter.losses, weights=meter.sizes), meter.values()[0]], by_hand.item(), rtol=1e-5)

# ---- the check

class Walk(Callback):
    "A walk that is made up: the weight of a linear model without data, places[k] after iteration k"
    order,run_valid = 54,False
    def __init__(self, places): self.places,self.k = places,0
    def after_batch(self):
        self.learn.model.weight.data.fill_(self.places[self.k])
        self.k += 1

def linear(n=1000, bs=20, n_valid=1000, valid_bs=50, **kw):
    "Predicts y = 2 x; the loss is (w-2)^2 times the mean of x^2"
    seed()
    xs = torch.randn(n+n_valid, 1)
    ds = list(zip(xs, 2*xs))
    data = DataLoaders(FastaiDataLoader(ds[:n], bs=bs, shuffle=True), FastaiDataLoader(ds[n:], bs=valid_bs))
    l = Learner(data, nn.Linear(1,1,bias=False), loss_func=MSELossFlat(), opt_func=SGD, lr=0., **kw)
    return l

def walk(places, epochs=4, swa=None, **kw):
    "From 6 towards 4, then by `places`, while the last quarter of the fit is averaged"
    l = linear(**kw)
    total = epochs*len(l.dls.train)
    swa = SWA(swa_lr=.1) if swa is None else swa
    begin = total*3//4
    at = np.interp(np.arange(begin+1, total+1), np.linspace(begin, total, len(places)), places)
    return l,swa,lambda: fit(l, epochs, cbs=[swa, Walk([*(6-np.arange(begin)*4/begin/2), *at])])

def test_worse_is_said_once_with_both_numbers():
    l,swa,f = walk([4., 2.])                       # straight to the right place: the last weights are the best, their mean lags
    ws = worse(f)
    assert len(ws)==1
    df = compare(swa, l)
    msg = str(ws[0].message)
    assert 'swa.restore(learn)' in msg and 'swa.compare(learn)' in msg
    mean,last = (float(o.strip('.,')) for o in (msg.split('loss ')[1].split()[0], msg.split('against ')[1].split()[0]))
    np.testing.assert_allclose([mean,last], [df.loss.iloc[2], df.loss.iloc[1]], rtol=.15, atol=1e-6)      # of all validation items, and of some
    assert ws[0].filename==fit.__code__.co_filename                                                    # the line that called learn.fit

def test_better_and_equal_say_nothing():
    assert not worse(walk([3., 1., 3., 1., 3., 1., 3., 1., 3., 1., 3., 1.])[2])      # around the right place
    assert not worse(walk([2.5, 2.5])[2])                                            # everywhere as good
    assert not worse(walk([2.501, 2.5])[2])                                          # a difference of less than a hundredth

def test_reasons():
    _,swa,f = walk([4., 2.])
    assert 'more epochs' in str(worse(f)[0].message)
    l = linear()
    lrs = [.1]*150+[.1*.95**i for i in range(50)]
    class Rate(Callback):
        order,run_valid = 61,False
        def before_batch(self): self.learn.opt.set_hyper('lr', lrs[self.learn.train_iter])
    swa = SWA(swa_lr=False)
    ws = worse(lambda: fit(l, 4, cbs=[swa, Rate(), Walk([6.]*150+list(np.linspace(4, 2, 50)))]))
    assert len(ws)==1 and 'hardly moved' in str(ws[0].message)

def test_the_loss_still_falls_is_seen():
    l = linear(n_valid=1000)
    l.lr = 1e-3                                      # a real descent that has only begun
    ws = worse(lambda: fit(l, 4, cbs=SWA()))
    assert len(ws)==1 and 'still falls' in str(ws[0].message)

def test_can_be_left_out_and_is_left_out_without_data():
    assert not worse(walk([4., 2.], swa=SWA(swa_lr=.1, check=False))[2])
    l,swa,f = walk([4., 2.], n=100, bs=20, n_valid=60, valid_bs=20, epochs=1)          # too little to say anything
    assert not worse(f)
    with pytest.raises(TypeError, match='check='): SWA(check=1)
    l = learner()
    l.dls = DataLoaders(l.dls.train)
    with pytest.raises(Exception): fit(l, 1, cbs=SWA())                                # fastai's own, with and without SWA

def odd_learner(train, valid, **kw): return learner(plain_net(), data=DataLoaders(train, valid), **kw)
items = [*zip(X[:400], Y[:400])]

class MyDL(FastaiDataLoader):
    def __init__(self, ds, extra, **kw): super().__init__(ds, **kw)

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(items[:self.n])

@pytest.mark.parametrize('make', [lambda n: MyDL(items[:n], 1, bs=64), lambda n: FastaiDataLoader(Stream(n), n=n, bs=64),
    lambda n: torch.utils.data.DataLoader(items[:n], batch_sampler=torch.utils.data.BatchSampler(range(n), 64, False))])
def test_loaders_that_cannot_be_made_smaller_are_left_alone(make):
    l,swa = odd_learner(make(400), make(100)),SWA()
    assert not told(lambda: fit(l, 10, cbs=swa), 'check') and swa._average.weights.is_applied()

def told(f, match):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f()
    return [w for w in ws if match in str(w.message)]

def test_an_error_in_the_check_is_no_reason_to_lose_the_average():
    "Validation data that this loss cannot score, which a callback knows"
    class No(Callback):
        def before_validate(self): raise CancelValidException()
    valid = [(x, torch.rand(3)) for x,_ in items[:100]]
    l,swa = odd_learner(FastaiDataLoader(items, bs=40), FastaiDataLoader(valid, bs=20), cbs=No(), metrics=[]),SWA()
    assert len(told(lambda: fit(l, 10, cbs=swa), 'could not be checked'))==1 and swa._average.weights.is_applied()

def test_the_check_starts_no_workers_and_has_four_batches(monkeypatch):
    class Data:
        def __init__(self): self.over = False
        def __len__(self): return 300
        def __getitem__(self, i):
            if self.over and torch.utils.data.get_worker_info() is not None: raise RuntimeError('a worker has read')
            return items[i]
    class Over(Callback):
        order = -100
        def after_fit(self): train.over = valid.over = True
    seen = []
    class Watched(FairCheck):
        def losses(self, *args):
            seen.append(super().losses(*args))
            return seen[-1]
    monkeypatch.setattr(callback, 'FairCheck', Watched)
    train,valid = Data(),Data()
    l = odd_learner(FastaiDataLoader(train, bs=50, num_workers=1), FastaiDataLoader(valid, bs=300, num_workers=1))
    assert not told(lambda: fit(l, 6, cbs=[SWA(), Over()]), 'check')
    assert [len(o) for o in seen]==[4,4] and [o.fake_l.num_workers for o in l.dls]==[1,1]

class MadeUp(FairCheck):
    "With losses that are made up for the last weights, then for the average, in batches of these sizes"
    def parts(self): return (self.learn.dls.train,1),(self.learn.dls.valid,1)
    def losses(self, *args):
        self.sizes,losses = self.made.pop(0)
        return np.array(losses, dtype=float)

def made_up(last, mean, sizes):
    l = linear()
    avg = ModelAverage(WeightAverage(l.model))
    avg.take(l.model)
    check = MadeUp(avg, l, None)
    check.made = [(sizes,last), (sizes,mean)]
    return check()

@pytest.mark.parametrize('last,mean', [([1,2,3,2], [1.5,2.4,3.6,2.5]), ([1,2,3,2], [1.5,1.6,3.6,2.1]), ([5,5,5], [5.04,5.04,5.04]), ([4,2], [5,4])])
def test_equal_batches_count_alike(last, mean):
    d = np.subtract(mean, last)
    clearly = d.mean()>max(2*d.std()/(len(d)-1)**.5, .01*np.mean(last))
    got = made_up(last, mean, [7]*len(d))
    assert got==pytest.approx((np.mean(mean), np.mean(last), 7*len(d))) if clearly else got is None

def test_every_item_counts_alike_in_the_check():
    "Against what the items' own losses say, and their own standard error on average"
    last,mean,sizes = [1.,1.2,.9,1.1,1.],[1.1,1.31,1.,1.2,.2],[50,50,50,50,2]
    got = made_up(last, mean, sizes)                     # two items of 202 are better
    assert got==pytest.approx((np.average(mean, weights=sizes), np.average(last, weights=sizes), 202))
    assert made_up(last, [1.,1.2,.9,1.1,9.], sizes) is None                                     # or worse
    d,n = np.random.default_rng(0).normal(0, 1, (20000,152)),[50,50,50,2]
    parts = np.stack([o.mean(1) for o in np.split(d, np.cumsum(n)[:-1], axis=1)], 1)
    errs = [mean_and_error(o, n)[1]**2 for o in parts]
    assert np.mean(errs)==pytest.approx(1/152, rel=.03)   # 20000 made-up walks: their own error is .6%
    assert mean_and_error(parts[0], n)[0]==pytest.approx(d[0].mean())

def test_the_check_weighs_a_small_last_batch_by_its_items():
    "600 validation items in batches of 64, the last of 24: on all of them, as `validate` has it"
    l,swa,f = walk([4., 2.], bs=50, n_valid=600, valid_bs=64, epochs=32)
    worse(f)
    swa.restore(l)
    with quiet(l): got = FairCheck(swa._average, l, swa.fit_state)()
    last = validate(l)[0]
    swa.apply(l)
    np.testing.assert_allclose(got, (validate(l)[0],last,600), rtol=1e-5)

def test_an_ema_that_lags_says_what_follows_faster():
    l,ema,f = walk([4., 2.], swa=EMA(.9, start=.75))
    ws = [str(w.message) for w in worse(f)]
    assert len(ws)==1 and 'smaller half_life' in ws[0] and 'ema.restore(learn)' in ws[0] and 'ema.compare(learn)' in ws[0]

def test_a_saw_tooth_is_no_annealing():
    l,swa,f = walk([4., 2.], swa=SWA(swa_lr=1e-3, swa_lr_max=.1))
    assert len(ws:=worse(f))==1 and 'hardly moved' not in str(ws[0].message) and 'BatchNorm' not in str(ws[0].message)

def test_nothing_left_to_train_is_nothing_to_check():
    seen = Seen()
    l = learner(nn.Sequential(seen, plain_net()), n=400, n_valid=100)
    fit(l, 10, cbs=(swa:=SWA(check=False)))
    swa.restore(l)
    seen.n,swa.check = 0,True
    fit(l, 10, start_epoch=10, cbs=swa)
    assert seen.n==0 and swa._average.weights.is_applied()

def test_compare_without_validation_data():
    l,swa = learner(),SWA(); fit(l, 3, cbs=swa)
    valid = l.dls.valid
    l.dls = DataLoaders(l.dls.train)
    with pytest.raises(ValueError, match='no validation data'): swa.compare(l)
    with pytest.raises(TypeError, match='knows its length'): swa.compare(l, dl=iter(valid))
    with quiet(l): assert len(swa.compare(l, dl=valid))==3

def test_the_check_of_fit_swa():
    for check in (True,False):
        l = linear()
        def go():
            with quiet(l): l.fit_swa(4, .1, check=check, cbs=Walk(np.linspace(6, 2, 200)))
        assert len(worse(go))==check

class Seen(nn.Module):
    "Counts items"
    def __init__(self): super().__init__(); self.n,self.trained = 0,0
    def forward(self, x):
        if self.training: self.trained += len(x)
        self.n += len(x)
        return x

@pytest.mark.parametrize('n,bs,n_valid,valid_bs,epochs', [(400,40,100,64,6), (200,10,100,100,12), (300,50,1000,500,5)])
def test_costs_a_twentieth_of_the_fit_at_most(n, bs, n_valid, valid_bs, epochs):
    def run(check):
        seen = Seen()
        xs = X[:n+n_valid].repeat(2,1,1,1)[:n+n_valid]
        ds = list(zip(xs, Y.repeat(2)[:n+n_valid]))
        data = DataLoaders(FastaiDataLoader(ds[:n], bs=bs, shuffle=True), FastaiDataLoader(ds[n:], bs=valid_bs))
        l = learner(nn.Sequential(seen, nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,10)), data=data)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fit(l, epochs, cbs=SWA(check=check))
        return seen.n
    extra,read = run(True)-run(False),epochs*(n+n_valid)
    assert 0<extra<=.05*read

def test_the_check_leaves_no_trace():
    runs = []
    for check in (True,False):
        l,swa = learner(net(.3)),SWA(check=check, eval_every=1); fit(l, 6, cbs=swa)
        runs.append((state(l.model), rng_fingerprint(l), l.recorder.values))
    assert same(runs[0][0], runs[1][0]) and runs[0][1]==runs[1][1]
    np.testing.assert_array_equal(runs[0][2], runs[1][2])

def test_out_of_memory_in_the_check_is_no_reason_to_lose_the_average():
    class Greedy(nn.Module):
        "Has no memory for the last weights' validation in the end"
        armed = False
        def forward(self, x):
            if Greedy.armed and not self.training: raise torch.OutOfMemoryError('out of memory')
            return x
    class Arm(Callback):
        order = -100
        def after_fit(self): Greedy.armed = not self.learn.lock.locked()
    l,swa = learner(nn.Sequential(Greedy(), plain_net())),SWA()
    fit(l, 6, cbs=[swa, Arm()])
    Greedy.armed = False
    assert swa._average.weights.is_applied()
