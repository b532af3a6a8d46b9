"EMA: its formula, its width, which steps count, and several averages in one fit. The matrix of test_applications has the rest"
import math, warnings

import pytest, torch
from common import *
from fastai.callback.training import GradientAccumulation
from fastswa.all import *
from fastswa.ema import EMAverage
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

def by_hand(ws, decay, warmup=True):
    "The average of the weights `ws` in float64; `decay` a number or one for each"
    mean = [w.double() for w in ws[0]]
    for k,w in enumerate(ws[1:], 2):
        d = decay if isinstance(decay, float) else decay[k-1]
        t = max(1-d, 1/k) if warmup else 1-d
        mean = [m+t*(o.double()-m) for m,o in zip(mean, w)]
    return mean

def assert_close(model, mean):
    for p,m in zip(model.parameters(), mean, strict=True): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)

# ---- the formula

@pytest.mark.parametrize('decay', [0., .5, .9, .999])
def test_equals_torch_at_a_fixed_decay(decay):
    class Torch(Callback):
        run_valid = False
        def before_fit(self): self.avg = AveragedModel(self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        def after_step(self): self.avg.update_parameters(self.learn.model)
    l,ref = learner(),Torch()
    fit(l, 4, cbs=[EMA(decay=decay, warmup=False), ref])
    for p,q in zip(l.model.parameters(), ref.avg.module.parameters(), strict=True): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)

@pytest.mark.parametrize('warmup', [True, False])
def test_the_width_is_a_share_of_the_fit(warmup):
    for n_epoch,half_life in (2,.2),(8,.05):
        l,spy = learner(),Spy()
        fit(l, n_epoch, cbs=[EMA(half_life, warmup=warmup), spy])
        assert_close(l.model, by_hand(spy.ws, .5**(1/(half_life*5*n_epoch)), warmup))

def test_warm_up_is_the_mean_of_all_as_long_as_the_width_is_not_reached():
    l,spy = learner(),Spy()
    fit(l, 3, cbs=[EMA(decay=.999), spy])                # 15 steps: 1/15 is more than .001
    assert_close(l.model, spy.mean(range(1,16)))

def test_start_and_every():
    for kw,its in (dict(start=.5),range(11,21)), (dict(start=2),range(11,21)), (dict(every=3),range(3,21,3)), (dict(start=1, every=4),range(9,21,4)):
        l,spy,ema = learner(),Spy(),EMA(decay=.7, **kw)
        fit(l, 4, cbs=[ema, spy])
        assert ema.n_averaged==len(its) and ema.collected==[its[0],its[-1]], kw
        assert_close(l.model, by_hand([spy.ws[i-1] for i in its], .7))

def test_every_counts_its_width_in_iterations():
    l,spy = learner(),Spy()
    fit(l, 4, cbs=[EMA(.2, every=5), spy])
    assert_close(l.model, by_hand([spy.ws[i-1] for i in (5,10,15,20)], .5**(5/(.2*20))))

def test_the_schedule_goes_on():
    a,b,s,t = learner(),learner(),Spy(),Spy()
    fit(a, 4, method='fit_one_cycle', cbs=s)
    fit(b, 4, method='fit_one_cycle', cbs=[EMA(eval_every=1), t])
    assert s.lrs==t.lrs and all(map(same, s.ws, t.ws)) and rng_fingerprint(a)==rng_fingerprint(b)

# ---- steps that were not made

class Skip(Callback):
    "Cancels the step of some iterations, as a gradient scaler does where gradients overflow"
    run_valid = False
    def __init__(self, its, exc, ev, order): self.its,self.exc,self.ev,self.order = its,exc,ev,order
    def before_fit(self): self.i = 0
    def before_batch(self): self.i += 1
    def go(self):
        if self.i in self.its: raise self.exc()
    def before_step(self):
        if self.ev=='before_step': self.go()
    def after_pred(self):
        if self.ev=='after_pred': self.go()

@pytest.mark.parametrize('exc,ev', [(CancelStepException,'before_step'), (CancelBatchException,'before_step'), (CancelBatchException,'after_pred')])
@pytest.mark.parametrize('order', [10, 100])
@pytest.mark.parametrize('every', [1, 2])
def test_skipped_steps_do_not_count(exc, ev, order, every):
    its = {1,2,5,6,11,20}
    l,spy,ema = learner(),Spy(),EMA(decay=.8, every=every)
    fit(l, 4, cbs=[ema, spy, Skip(its, exc, ev, order)])
    real = [i for i in range(1,21) if i not in its][every-1::every]
    assert ema.n_averaged==len(real)
    assert_close(l.model, by_hand([spy.ws[i-1] for i in real], .8))

def test_accumulated_gradients():
    l,spy,ema = learner(),Spy(),EMA(.2)
    fit(l, 4, cbs=[ema, spy, GradientAccumulation(80)])      # every second batch of 40
    real = range(2,21,2)
    assert ema.n_averaged==10
    assert_close(l.model, by_hand([spy.ws[i-1] for i in real], .5**(2/(.2*20))))

def test_only_the_second_fit_of_fine_tune():
    l,spy,ema = learner(splitter=two_groups),Spy(),EMA(.3)
    fit(l, 3, method='fine_tune', freeze_epochs=2, cbs=[ema, spy])
    assert ema.n_averaged==15
    assert_close(l.model, by_hand(spy.ws, .5**(1/(.3*15))))

def test_weights_that_are_no_numbers_are_left_out():
    class Spoil(Callback):
        order,run_valid = 20,False
        def after_step(self):
            with torch.no_grad():
                w = self.learn.model[0].weight
                if self.learn.train_iter==7: self.kept = w.clone(); w[0] = math.nan
                if self.learn.train_iter==8: w.copy_(self.kept)
    l,ema = learner(),EMA()
    with pytest.warns(UserWarning, match='not finite'): fit(l, 4, cbs=[ema, Spoil()])
    assert 0<ema.n_averaged<20 and all(p.isfinite().all() for p in l.model.parameters())

# ---- stopping and going on

@pytest.mark.parametrize('kw', [dict(), dict(every=3), dict(decay=.9, warmup=False)])
def test_a_resumed_fit_ends_as_one_that_was_not_stopped(kw, tmp_path):
    class Seeds(Callback):
        order = -100
        def before_epoch(self):
            seed(self.learn.epoch)
            self.learn.dls.train.rng = random.Random(self.learn.epoch)
    whole,want = learner(),EMA(.2, **kw)
    fit(whole, 6, cbs=[want, Seeds()])
    class Stop(Callback):
        order = 200
        def after_epoch(self):
            if self.learn.epoch==3:
                self.learn.save('m')
                raise KeyboardInterrupt('stop')
    l = learner(path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(l, 6, cbs=[EMA(.2, save_to=tmp_path/'e', **kw), Seeds(), Stop()])
    again = learner(path=tmp_path, s=1)
    again.create_opt()
    again.load('m')
    got = EMA(.2, **kw).load(tmp_path/'e')
    fit(again, 6, start_epoch=4, cbs=[got, Seeds()])
    assert same(state(whole.model), state(again.model)) and got.n_averaged==want.n_averaged

def test_files_are_of_one_kind(tmp_path):
    for cls,other in (EMA,SWA),(SWA,EMA):
        cb = cls()
        fit(learner(), 3, cbs=cb)
        cb.save(tmp_path/'f')
        with pytest.raises(ValueError, match=f'not the state of an {other.__name__} callback: it is that of a callback of another kind'): other().load(tmp_path/'f')
        l = learner(s=1)
        with quiet(l): cls().load(tmp_path/'f').apply(l)
        assert same(weights(l.model), cb._average.weights.average)

def test_a_state_without_an_average_loads_too(tmp_path):
    for cls in EMA,SWA:
        cls().save(tmp_path/'f')
        assert cls().load(tmp_path/'f').n_averaged==0

def test_no_step_goes_backwards():
    "An epoch that is made again, or the file of a longer fit"
    l,ema,steps = learner(),EMA(.2, warmup=False),[]
    class Watched(EMAverage):
        def step_size(self):
            steps.append(super().step_size())
            return steps[-1]
    ema.make_average = lambda model: Watched(model, warmup=False)
    fit(l, 4, cbs=ema)
    ema.restore(l)
    fit(l, 4, start_epoch=2, cbs=ema)
    assert len(steps)==30 and all(0<o<=1 for o in steps)

def test_what_it_answers():
    l,ema = learner(),EMA(eval_every=1)
    fit(l, 3, cbs=ema)
    assert l.recorder.metric_names[4:]==['ema_loss','ema_accuracy','time']
    assert same(state(ema.ema_model), state(l.model)) and repr(ema)=='EMA(n_averaged=15)'
    with quiet(l):
        df = ema.compare(l)
        np.testing.assert_allclose(df.loc['average'], l.validate(), rtol=1e-6)
        ema.restore(l)
        np.testing.assert_allclose(df.loc['last weights'], l.validate(), rtol=1e-6)
    with pytest.raises(TypeError, match=r'ema.apply\(learn\)'): ema.apply(None)
    ax = ema.plot_sched()
    assert ax.get_legend() is None

# ---- more than one

def test_two_averages_one_installed():
    l,swa,ema,spy = learner(),SWA(eval_every=1, start=1),EMA(.2, install=False, eval_every=1),Spy()
    fit(l, 4, cbs=[swa, ema, spy])
    row = dict(zip(l.recorder.metric_names[1:], l.recorder.values[-1]))
    assert_close(l.model, spy.mean(swa.collected))
    with quiet(l):
        np.testing.assert_allclose(l.validate(), [row['swa_loss'],row['swa_accuracy']], rtol=1e-6)
        swa.restore(l)
        ema.apply(l)
        assert_close(l.model, by_hand(spy.ws, .5**(1/(.2*20))))
        np.testing.assert_allclose(l.validate(), [row['ema_loss'],row['ema_accuracy']], rtol=1e-6)
        ema.restore(l)
    assert same(weights(l.model), spy.ws[-1])

def test_each_is_what_it_is_alone():
    both,swa,ema = learner(),SWA(),EMA(install=False)
    fit(both, 4, cbs=[ema, swa])
    l,alone = learner(),SWA()
    fit(l, 4, cbs=alone)
    assert same(state(l.model), state(both.model))
    l,alone = learner(),EMA(install=False)
    fit(l, 4, cbs=[alone, SWA(install=False)])
    with quiet(l): alone.apply(l)
    with quiet(both):
        swa.restore(both)
        ema.apply(both)
    assert same(state(l.model), state(both.model))

def test_what_another_average_has_put_in_is_not_compared_as_the_last_weights():
    l,swa,ema = learner(),SWA(),EMA(install=False)
    fit(l, 4, cbs=[swa, ema])
    installed = state(l.model)
    with quiet(l), pytest.raises(RuntimeError, match=r'holds the average of another callback.*swa.restore\(learn\)'): ema.compare(l)
    assert same(state(l.model), installed) and swa._average.weights.is_applied()
    with quiet(l):
        ema.apply(l)                                         # one over the other, and off again
        ema.restore(l)
        assert same(state(l.model), installed) and swa._average.weights.is_applied()
        swa.restore(l)
        df = ema.compare(l)
        ema.apply(l)
        np.testing.assert_allclose(l.validate(), df.loc['average'], rtol=1e-6)
    fit(l, 1, cbs=(later:=SWA(start=0)))                     # trained on: nobody's average is in it
    assert later._average.weights.is_applied()

def test_any_number_may_watch():
    l = learner()
    cbs = [EMA(.1, install=False, eval_every=1), EMA(.3, install=False, eval_every=1), SWA(install=False, eval_every=1, swa_lr=False)]
    spy = Spy()
    fit(l, 4, cbs=[*cbs, spy])
    assert [n for n in l.recorder.metric_names if '_loss' in n]==['train_loss','valid_loss','ema_loss','ema2_loss','swa_loss']
    assert same(weights(l.model), spy.ws[-1])                # none is installed
    last = dict(zip(l.recorder.metric_names[1:], l.recorder.values[-1]))
    for cb,prefix in zip(cbs, ('ema','ema2','swa')):
        with quiet(l):
            cb.apply(l)
            np.testing.assert_allclose(l.validate()[0], last[f'{prefix}_loss'], rtol=1e-6)
            cb.restore(l)

@pytest.mark.parametrize('cbs,who', [(lambda: [SWA(),EMA()],'SWA and EMA callbacks'), (lambda: [EMA(),EMA(.1)],'two EMA callbacks'), (lambda: [EMA(),SWA(swa_lr=False)],'EMA and SWA callbacks')])
def test_two_that_want_to_be_installed_are_refused(cbs, who):
    l = learner()
    before = state(l.model)
    with pytest.raises(ValueError, match=who+r', and only one average can end up in the model.*install=False'): fit(l, 2, cbs=cbs())
    assert same(state(l.model), before) and not [cb for cb in l.cbs if isinstance(cb, (SWA,EMA))]

@pytest.mark.parametrize('kw', [dict(), dict(at_end=True), dict(every_epoch=True)])
def test_save_model_on_the_column_of_one_that_only_watches(kw, tmp_path):
    l,ema,spy = learner(path=tmp_path),EMA(.2, install=False, eval_every=1),Spy()
    fit(l, 4, cbs=[ema, SaveModelCallback(monitor='ema_loss', **kw), spy])
    assert same(weights(l.model), spy.ws[-1])                # nothing is loaded into the model
    file = next(tmp_path.glob('models/*3.pth' if 'every_epoch' in kw else 'models/*.pth'))
    other = learner(path=tmp_path)
    other.load(file.stem)
    if 'every_epoch' in kw or 'at_end' in kw: assert_close(other.model, by_hand(spy.ws, .5**(1/(.2*20))))
    else:
        losses = [r[l.recorder.metric_names.index('ema_loss')-1] for r in l.recorder.values]
        k = 5*(1+int(np.argmin(losses)))
        assert_close(other.model, by_hand(spy.ws[:k], .5**(1/(.2*20))))

def test_the_best_average_knows_what_is_in_it(tmp_path):
    class Made(Callback):
        "The ema_loss of each epoch, made up: the second is the best"
        order = Recorder.order+1
        def after_epoch(self): self.learn.recorder.values[-1][self.learn.recorder.metric_names.index('ema_loss')-1] = [3.,1.,2.,4.][self.learn.epoch]
    l,ema,spy = learner(path=tmp_path),EMA(.2, eval_every=1),Spy()
    fit(l, 4, cbs=[ema, SaveModelCallback(monitor='ema_loss'), Made(), spy])
    assert_close(l.model, by_hand(spy.ws[:10], .5**(1/(.2*20))))
    assert ema.n_averaged==10 and ema.collected==[1,10]

def test_with_an_ensemble():
    l,ema,snap = learner(),EMA(install=True),SnapshotEnsemble(2)
    fit(l, 4, cbs=[ema, snap])
    assert ema.n_averaged==20 and snap.n_members==2

# ---- arguments

@pytest.mark.parametrize('kw,exc,match', [(dict(half_life=0),ValueError,'half_life'), (dict(half_life='x'),TypeError,'half_life'), (dict(decay=1),ValueError,r'\[0,1\)'),
    (dict(decay=-.1),ValueError,'decay'), (dict(every=0),ValueError,'every'), (dict(every=1.5),TypeError,'every'), (dict(start=1.5),ValueError,'start'), (dict(start=-1),ValueError,'start'),
    (dict(warmup=1),TypeError,'warmup'), (dict(install=1),TypeError,'install'), (dict(eval_every=-1),ValueError,'eval_every'),
    (dict(ema_decay=.9),TypeError,r'EMA\(ema_decay=...\): it has no parameter ema_decay. It takes half_life, decay,')])
def test_bad_arguments(kw, exc, match):
    with pytest.raises(exc, match=match): EMA(**kw)

def test_step_size():
    avg = EMAverage(nn.Linear(2,2), decay=.75)
    steps = []
    for _ in range(6):
        steps.append(avg.step_size())
        avg.n += 1
    assert steps==[1, .5, 1/3, .25, .25, .25]
    assert EMAverage(nn.Linear(2,2), warmup=False, decay=.75).step_size()==1
