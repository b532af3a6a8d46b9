"Promises 1-8 and 10, at the callback"
import gc, math, os, pickle, signal, subprocess, sys, textwrap, threading
from copy import deepcopy

import pytest, torch
from common import *
from fastswa import callback
from fastswa.batchnorm import update_bn
from fastswa import average
from fastswa.callback import SWA
from fastswa.cycle import FitState, Helper
from fastswa.schedule import swa_cycles, swa_lrs

class Hand(Callback):
    "The learning rates of a list, set as late as SWA sets them"
    order,run_valid = 61,False
    def __init__(self, lrs): self.lrs = lrs
    def before_fit(self): self.k = 0
    def before_batch(self): self.learn.opt.set_hyper('lr', float(self.lrs[self.k])); self.k += 1

class Streams(Callback):
    "All random streams and the metrics after each epoch"
    order = 1000
    def before_fit(self): self.rng,self.vals,self.losses = [],[],[]
    def after_epoch(self):
        rec = self.learn.recorder
        cols = [i for i,n in enumerate(rec.metric_names[1:]) if n!='time' and not n.startswith('swa_')]
        self.rng.append(rng_fingerprint(self.learn)); self.vals.append([rec.values[-1][i] for i in cols]); self.losses = list(map(float, rec.losses))

def helpers(learn): return [cb for cb in learn.cbs if isinstance(cb, Helper)]
def mean_of(spy, swa): return spy.mean(swa.collected)
def assert_is_mean(model, spy, swa, tol=1e-6):
    for p,m in zip(model.parameters(), mean_of(spy, swa)): torch.testing.assert_close(p.detach().double(), m, atol=tol, rtol=tol)

# ---- 1. the same walk

@pytest.mark.parametrize('eval_every,workers,extra', [(0,0,[]), (1,0,[]), (2,0,[MixUp]), (1,2,[]), (1,0,[CutMix, GradientClip]), (1,0,[MixedPrecision])])
def test_same_walk(eval_every, workers, extra):
    lrs,_ = swa_lrs(4, 5, .1)
    ref,spy,st = learner(net(.3), workers=workers),Spy(),Streams()
    fit(ref, 4, cbs=[Hand(lrs), spy, st, *[o() for o in extra]])
    l,spy2,st2,swa = learner(net(.3), workers=workers),Spy(),Streams(),SWA(eval_every=eval_every)
    fit(l, 4, cbs=[swa, spy2, st2, *[o() for o in extra]])
    assert len(spy.ws)==20 and all(same(a,b) for a,b in zip(spy.ws,spy2.ws)) and spy.lrs==spy2.lrs
    assert st.losses==st2.losses and st.vals==st2.vals and st.rng==st2.rng
    assert swa.n_averaged==5 and rng_fingerprint(ref)==rng_fingerprint(l)
    swa.restore(l)
    assert same(state(l.model), state(ref.model))      # statistics included

def test_swa_lr_False_changes_nothing_at_all():
    ref,spy = learner(),Spy(); fit(ref, 4, method='fit_flat_cos', cbs=spy, pct_start=.9, div_final=2)
    l,spy2 = learner(),Spy(); swa = SWA(swa_lr=False); fit(l, 4, method='fit_flat_cos', cbs=[swa,spy2], pct_start=.9, div_final=2)
    assert spy.lrs==spy2.lrs and all(same(a,b) for a,b in zip(spy.ws,spy2.ws)) and swa.n_averaged==5

# ---- 2. the schedule is the one promised

@pytest.mark.parametrize('kw', [dict(), dict(start=.5, cycle_len=1), dict(start=2, swa_lr=.02, swa_lr_max=.08, cycle_len=2), dict(start=1, cycle_len=.4, swa_lr=.03),
    dict(start=0), dict(start=.3, cycle_len=.7, swa_lr_max=.2, sched=SchedCos)])
@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_flat_cos'])
def test_rates_and_collection_points(kw, method):
    l,spy,swa = learner(),Spy(),SWA(**kw)
    fit(l, 5, method=method, cbs=[swa, spy])
    base = {'fit': .1, 'fit_one_cycle': combined_cos(.25, .1/25, .1, .1/1e5), 'fit_flat_cos': combined_cos(.75, .1, .1, .1/1e5)}[method]
    lrs,cyc = swa_lrs(5, 5, base, **{k:v for k,v in kw.items() if k!='sched'}, sched=kw.get('sched', SchedLin))
    np.testing.assert_allclose([o[0] for o in spy.lrs], lrs, rtol=1e-6)
    assert swa.collected==list(cyc.ends) and swa.collected[-1]==25 and swa.n_averaged==len(cyc.ends)
    assert_is_mean(l.model, spy, swa)
    np.testing.assert_allclose(list(swa.fit_state.lrs), lrs, rtol=1e-6)

def test_momentum_is_held_with_the_rate():
    l,moms = learner(),[]
    class M(Callback):
        order,run_valid = 1000,False
        def after_batch(self): moms.append(self.learn.opt.hypers[-1]['mom'])
    fit(l, 4, method='fit_one_cycle', cbs=[SWA(), M()])
    assert len(set(moms[15:]))==1 and len(set(moms[5:15]))==10

def test_discriminative_rates_keep_their_proportions():
    for swa_lr,want in [(None,[.005,.05]), (.04,[.004,.04]), ([.01,.02],[.01,.02]), (slice(.001,.01),[.001,.01])]:
        l,spy = learner(splitter=two_groups),Spy()
        fit(l, 4, slice(.01,.1), cbs=[SWA(swa_lr=swa_lr), spy])
        np.testing.assert_allclose(spy.lrs[:15], [[.01,.1]]*15); np.testing.assert_allclose(spy.lrs[15:], [want]*5)
    with pytest.raises(ValueError, match='2 parameter groups'): fit(learner(splitter=two_groups), 4, cbs=SWA(swa_lr=[.1]*3))

def test_torch_optimizers():
    l,spy,swa = learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),Spy(),SWA()
    fit(l, 4, .01, cbs=[swa,spy])
    np.testing.assert_allclose([o[0] for o in spy.lrs], [.01]*15+[.005]*5); assert_is_mean(l.model, spy, swa)

def test_short_epochs_and_cancelled_trains_still_collect():
    class Short(Callback):
        def after_batch(self):
            if self.learn.training and self.learn.iter==2: raise CancelTrainException
    l,swa = learner(),SWA(start=2, cycle_len=1)
    fit(l, 4, cbs=[swa,Short()])
    assert swa.n_averaged==2

def test_epochs_that_change_their_length():
    class Grow(Callback):
        def __init__(self, n): self.n = n
        def before_epoch(self):
            if self.learn.epoch==2: self.learn.dls = dls(n=self.n)
    for n in (400,120):
        l,swa = learner(),SWA(start=1, cycle_len=1); fit(l, 5, cbs=[swa,Grow(n)])
        assert swa.collected==[10,15,20,25]
        ax = swa.plot_sched(); np.testing.assert_allclose(ax.lines[1].get_xdata(), [2,3,4,5])

def test_fit_swa_is_the_authors_recipe():
    l,spy = learner(),Spy()
    with quiet(l): swa = l.fit_swa(8, .1, .03, start=.5, cycle_len=1, cbs=spy)
    lrs = [o[0] for o in spy.lrs]
    assert isinstance(swa, SWA) and swa.n_averaged==4 and lrs[0]==lrs[10]==.1 and lrs[18]==pytest.approx(.03) and lrs[20:]==[.03]*20
    assert lrs[14]==pytest.approx(.1+(.03-.1)*(14/20-.5)/.4)
    assert_is_mean(l.model, spy, swa)
    with quiet(l):
        assert l.fit_swa(4, .1, swa_lr_max=.08, swa_lr=.01, cycle_len=1, eval_every=2).n_averaged==1
        with pytest.raises(ValueError, match='swa_lr=False'): l.fit_swa(4, swa_lr=False)

def test_bad_sched_state_of_plot():
    with pytest.raises(RuntimeError, match='plot_swa_sched'): SWA().plot_sched()
    l,swa = learner(),SWA(start=2, cycle_len=1); fit(l, 4, cbs=swa)
    ax = swa.plot_sched()
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [3,4]); np.testing.assert_allclose(ax.lines[1].get_ydata(), [.05,.05])

# ---- 3. and 4. the average, its statistics, its columns

def test_statistics_and_columns():
    l,spy,swa = learner(),Spy(),SWA(eval_every=1, start=.5, cycle_len=1)
    fit(l, 4, cbs=[swa,spy])
    assert list(l.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','swa_loss','swa_accuracy','time']
    vals = np.array(l.recorder.values, dtype=float)
    assert np.isnan(vals[:2,3:]).all() and np.isfinite(vals[2:]).all() and all(len(o)==5 for o in l.recorder.values)
    np.testing.assert_allclose(_validate(l), vals[-1,3:], rtol=1e-6)   # validate repeats the last columns
    ref = net(); ref.load_state_dict(l.model.state_dict())
    update_bn(ref.train(), [X[:200]])          # by hand: the average on the training data
    torch.testing.assert_close(l.model[1].running_mean, ref[1].running_mean, atol=1e-6, rtol=1e-6)   # the first layer, for any batches
    torch.testing.assert_close(l.model[1].running_var,  ref[1].running_var,  atol=1e-6, rtol=1e-5)
    swa.restore(l)
    assert (l.model[4].running_var-ref[4].running_var).abs().max()>1e-3                               # a forgotten refresh would be seen

def _validate(l):
    with quiet(l): return l.validate()

@pytest.mark.parametrize('k,have', [(1,[2,3,4]), (2,[3,4]), (3,[2,4]), (10,[4])])
def test_eval_every(k, have):
    l = learner(); fit(l, 5, cbs=SWA(eval_every=k, start=2, cycle_len=1))
    got = [i for i,v in enumerate(l.recorder.values) if not math.isnan(v[-1])]
    last = l.recorder.values[-1][-2:]
    assert got==have
    np.testing.assert_allclose(_validate(l), last, rtol=1e-6)

def test_validate_right_after_repeats_the_last_columns():
    for extra in ([], [MixUp()], [MixedPrecision()]):
        l = learner(net(.3), cbs=extra); fit(l, 3, cbs=SWA(eval_every=1))
        last = l.recorder.values[-1][-2:]
        np.testing.assert_allclose(_validate(l), last, rtol=1e-6)

def test_statistics_see_the_augmentation():
    class Aug(Callback):
        "On training batches only, as the transforms of a training loader"
        def before_batch(self):
            if self.learn.dl is self.learn.dls.train: self.learn.xb = (self.learn.xb[0]+1,)
    l = learner(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,10)), cbs=Aug()); fit(l, 2, cbs=SWA())
    torch.testing.assert_close(l.model[0].running_mean[0], X[:200].mean()+1, atol=1e-5, rtol=1e-5)

def test_bn_batches():
    l = learner(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64,10)), shuffle=False); fit(l, 2, cbs=SWA(bn_batches=2))
    torch.testing.assert_close(l.model[0].running_mean[0], X[:80].mean(), atol=1e-6, rtol=1e-6)

def test_cancelled_in_the_first_epoch_is_refreshed_all_the_same():
    class Stop(Callback):
        order,run_valid = 200,False
        def after_batch(self):
            if self.learn.train_iter==4: raise CancelFitException
    l,swa = learner(),SWA(); fit(l, 1, cbs=[swa,Stop()])
    assert swa.n_averaged and len(swa._average.stats.layers)==2
    ref = net(); ref.load_state_dict(l.model.state_dict()); update_bn(ref.train(), [X[:200]])
    torch.testing.assert_close(l.model[1].running_mean, ref[1].running_mean, atol=1e-6, rtol=1e-6)
    other = learner(); fit(other, 1, cbs=[swa,Stop()])         # another model, the same callback
    assert swa._average.stats.layers==[other.model[1],other.model[4]]

def test_frozen_layers_stay_after_a_resume(tmp_path):
    def make():
        l = learner(cbs=BnFreeze())
        for p in l.model[1].parameters(): p.requires_grad_(False)
        l.model[1].running_mean.fill_(.3)
        return l
    l = make(); boom = Boom('after_epoch', KeyboardInterrupt, 2)
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[SWA(start=1, save_to=tmp_path/'s.pt'), boom])
    for keep in (True,False):
        state = torch.load(tmp_path/'s.pt', weights_only=True)
        if not keep: state['layers'] = None                    # then the learner's own BnFreeze tells
        new,swa = make(),SWA(); swa.load_state_dict(state)
        with new.no_bar(): swa.apply(new)
        assert (new.model[1].running_mean==.3).all() and (new.model[4].running_mean!=0).all()

def test_layers_frozen_in_training_stay():
    l = learner(cbs=BnFreeze())
    for p in l.model[1].parameters(): p.requires_grad_(False)
    before = l.model[1].running_mean.clone()
    fit(l, 3, cbs=SWA(eval_every=1))
    assert torch.equal(l.model[1].running_mean, before)

def test_no_evaluation_no_columns_and_odd_recorders():
    l = learner(); fit(l, 2, cbs=SWA()); assert 'swa_loss' not in l.recorder.metric_names
    for kw,n in [(dict(add_time=False),6), (dict(train_metrics=True),8)]:
        l = learner(); l.remove_cb(Recorder); l.add_cb(Recorder(**kw))
        fit(l, 2, cbs=SWA(eval_every=1))
        assert len(l.recorder.metric_names)==n and all(len(v)==n-1-l.recorder.add_time for v in l.recorder.values)
    l = learner(); l.remove_cb(Recorder); l.add_cb(Recorder(valid_metrics=False)); swa = SWA(eval_every=1)
    fit(l, 2, cbs=swa); assert swa.n_averaged and not any('swa' in o for o in l.recorder.metric_names) and {len(v) for v in l.recorder.values}=={1}
    l = learner(metrics=[accuracy, ValueMetric(lambda: 3., 'three'), error_rate])
    fit(l, 2, cbs=SWA(eval_every=1))
    assert list(l.recorder.metric_names[-4:])==['swa_loss','swa_accuracy','swa_error_rate','time']
    l = learner(); l.remove_cbs([l.recorder, l.progress]); swa = SWA(eval_every=1); l.fit(2, cbs=swa); assert swa.n_averaged   # no Recorder at all

def test_metrics_that_cannot_be_copied():
    class Locked(AvgMetric):
        def __init__(self): super().__init__(accuracy); self.lock = threading.Lock()
        @property
        def name(self): return 'locked'
    class Stubborn(Locked):
        def __copy__(self): raise TypeError('one of a kind')
    for m in (Locked(), Stubborn()):
        l = learner(metrics=[accuracy, m]); fit(l, 3, cbs=SWA(eval_every=1))
        v = l.recorder.values[-1]; assert v[2]==v[3] and v[5]==v[6]

def test_accumulating_metrics():
    from fastai.metrics import F1Score
    l = learner(metrics=[F1Score(average='macro')]); fit(l, 3, cbs=SWA(eval_every=1))
    last = l.recorder.values[-1]
    np.testing.assert_allclose(_validate(l), last[-2:], rtol=1e-6)
    with l.no_bar(): p,t = l.get_preds()
    from sklearn.metrics import f1_score
    assert last[4]==pytest.approx(f1_score(t, p.argmax(1), average='macro'))

# ---- 5. not a fit

def image_dls(n=64, bs=16):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImageBW
    imgs = (X[:n,0]*255).byte().numpy()
    seed()
    return DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=lambda i: imgs[i], get_y=lambda i: int(Y[i]),
                     splitter=IndexSplitter(list(range(n*3//4, n)))).dataloaders(list(range(n)), bs=bs, num_workers=0)

@pytest.mark.parametrize('when', ['before a fit','after a fit'])
def test_what_is_not_a_fit_is_not_touched(when, tmp_path):
    from fastai.vision.all import ClassificationInterpretation
    swa = SWA(start=1, cycle_len=1, eval_every=1)      # one cycle of one epoch would not fit into the one-epoch fit that lr_find and tta resemble
    l = learner(data=image_dls(), path=tmp_path, cbs=swa)
    if when=='after a fit': fit(l, 2)
    w,n,attached = state(l.model),swa.n_averaged,len(l.cbs)
    img = l.dls.train_ds[0][0]
    with l.no_bar(), l.no_logging():
        for f in (l.validate, l.get_preds, lambda: l.predict(img), lambda: l.tta(n=2), lambda: l.lr_find(show_plot=False, num_it=8), lambda: l.show_results(max_n=2),
                  lambda: ClassificationInterpretation.from_learner(l).confusion_matrix(), l.summary):
            f()
            assert same(state(l.model), w) and swa.n_averaged==n and len(helpers(l))==2
    assert len(l.cbs)==attached and n==(1 if when=='after a fit' else 0)

def test_nested_validate_and_fetch_preds_inside_a_fit():
    class Nested(Callback):
        def after_epoch(self): self.learn.validate() if not self.learn.lock.locked() else None
    l,swa = learner(),SWA(eval_every=1, start=1, cycle_len=1)
    class Keep(Callback):
        order,run_valid = 2000,False
        ws = []
        def after_train(self): self.ws.append(weights(self.learn.model))
    with quiet(l): l.fit(4, cbs=[swa, Nested(), Keep()])
    assert swa.n_averaged==3
    for k,p in enumerate(l.model.parameters()): torch.testing.assert_close(p.detach(), torch.stack([w[k] for w in Keep.ws[1:]]).mean(0), atol=1e-6, rtol=1e-6)
    for attached in (True,False):
        l,swa = learner(),SWA(eval_every=1)
        cbs = [swa,FetchPredsCallback()]
        if attached: l.add_cbs(cbs)
        fit(l, 3, cbs=None if attached else cbs)
        assert swa.n_averaged==4 and len(helpers(l))==2*attached
        l.remove_cb(FetchPredsCallback)                        # with it attached, fastai's own validate waits for ever
        with l.no_bar(): l.validate(); l.get_preds()

# ---- 6. plays well

def test_save_model_reloads_first_and_is_what_restore_gives(tmp_path):
    l,swa = learner(path=tmp_path),SWA()
    class Worse(Callback):
        "Valid loss is best after the second epoch"
        order = 59
        def after_epoch(self):
            v = self.learn.recorder.values[-1]
            v[1] = float(abs(self.learn.epoch-1))
    spy = Spy()
    fit(l, 4, cbs=[swa, SaveModelCallback(), Worse(), spy])
    assert_is_mean(l.model, spy, swa)
    swa.restore(l)
    assert same(weights(l.model), spy.ws[9])        # the best of the walk, which SaveModel had loaded

class Scripted(Callback):
    "The swa_loss of each epoch, made up"
    order = Recorder.order+1
    def __init__(self, vals): self.vals = vals
    def after_epoch(self):
        rec = self.learn.recorder
        i = list(rec.metric_names[1:]).index('swa_loss')
        if not math.isnan(rec.values[-1][i]): rec.values[-1][i] = self.vals[self.learn.epoch]

def test_save_model_on_swa_loss_saves_and_leaves_the_best_average(tmp_path):
    l,swa,spy = learner(path=tmp_path),SWA(eval_every=1, start=1, cycle_len=1),Spy()
    fit(l, 5, cbs=[swa, SaveModelCallback(monitor='swa_loss'), Scripted([9,3,1,2,4]), spy])
    best = spy.mean([10,15])                        # the average after the third epoch, of two snapshots
    for p,m in zip(l.model.parameters(),best): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)
    assert swa.n_averaged==2
    saved = torch.load(tmp_path/'models'/'model.pth', weights_only=False)
    assert same({k:v for k,v in saved.items()}, dict(l.model.state_dict()))
    now = state(l.model)
    swa.restore(l); assert same(weights(l.model), spy.ws[-1])
    swa.apply(l);   assert same(state(l.model), now)

def test_best_average_of_half_precision_weights(tmp_path):
    l,swa,spy = learner(net().bfloat16(), path=tmp_path, opt_func=SGD),SWA(eval_every=1, start=1, cycle_len=1),Spy()
    class Half(Callback):
        order = 5
        def before_batch(self): self.learn.xb = (self.learn.xb[0].bfloat16(),)
        def after_pred(self): self.learn.pred = self.learn.pred.float()
    fit(l, 5, cbs=[swa, SaveModelCallback(monitor='swa_loss'), Scripted([9,3,1,2,4]), spy, Half()])
    best = weights(l.model)
    assert swa.n_averaged==2 and len(swa.collected)==2
    for p,m in zip(best, spy.mean([10,15])): torch.testing.assert_close(p.double(), m, atol=1e-2, rtol=1e-2)
    assert all(torch.equal(a.bfloat16(),b) for a,b in zip(swa._average.weights.average,best)) and same(weights(swa.copy_to(net().bfloat16())), best)
    swa.restore(l); swa.apply(l); assert same(weights(l.model), best)

def test_tracker_left_off_by_an_interrupt_works_in_the_next_fit(tmp_path):
    save = SaveModelCallback(monitor='swa_loss'); l = learner(path=tmp_path, cbs=save)
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[SWA(eval_every=1, start=1, cycle_len=1), Boom('after_epoch', KeyboardInterrupt, 1)])
    save.best = -1.                                            # no value could be better
    fit(l, 3, cbs=SWA(eval_every=1)); assert save.best>0

def test_save_model_on_swa_loss_when_nothing_was_averaged(tmp_path):
    l = learner(path=tmp_path)
    (tmp_path/'models').mkdir(); torch.save({'stale': 1}, tmp_path/'models'/'model.pth')
    with pytest.warns(UserWarning, match='never start'): fit(l, 2, cbs=[SWA(start=5, eval_every=1), SaveModelCallback(monitor='swa_loss')])
    assert not hasattr(l, 'swa')                    # and the stale file was not loaded

@pytest.mark.parametrize('kw', [dict(every_epoch=1), dict(at_end=True)])
def test_other_ways_of_saving(kw, tmp_path):
    l,swa,spy = learner(path=tmp_path),SWA(eval_every=1, start=1, cycle_len=1),Spy()
    fit(l, 3, cbs=[swa, SaveModelCallback(monitor='swa_loss', **kw), spy])
    f = tmp_path/'models'/('model_2.pth' if 'every_epoch' in kw else 'model.pth')
    assert same(torch.load(f, weights_only=False), dict(l.model.state_dict())) and swa.n_averaged==2

def test_early_stopping_waits_for_the_first_average():
    l,swa = learner(),SWA(eval_every=1, start=4, cycle_len=1)
    fit(l, 10, cbs=[swa, EarlyStoppingCallback(monitor='swa_loss', patience=2), Scripted([0]*4+[5,4,6,7,8,9])])
    assert len(l.recorder.values)==8 and swa.n_averaged==4      # epochs 4-7: best at 5, two without improvement

def test_trackers_wait_in_an_epoch_that_was_cancelled():
    "The value of the epoch before is none of this one"
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.epoch==4: raise CancelEpochException()
    swa,l,seen = SWA(eval_every=1, start=2, cycle_len=1),learner(),[]
    class Look(TrackerCallback):
        def after_epoch(self): seen.append(self.epoch)
    fit(l, 6, cbs=[swa, Cancel(), Look(monitor='swa_loss')])
    assert seen==[2,3,5]

def test_early_stopping_waits_between_evaluations():
    l = learner(); fit(l, 8, cbs=[SWA(eval_every=3, start=1, cycle_len=1), EarlyStoppingCallback(monitor='swa_loss', patience=1), Scripted([9,9,5,5,5,4,4,3])])
    assert len(l.recorder.values)==8

def test_trackers_of_other_columns_are_left_alone():
    l = learner(); cb = EarlyStoppingCallback(monitor='valid_loss', patience=2, min_delta=100.)
    fit(l, 8, cbs=[SWA(eval_every=1), cb]); assert len(l.recorder.values)==3

def test_csv_logger_rows_have_the_columns(tmp_path):
    l = learner(path=tmp_path, cbs=CSVLogger())
    with l.no_bar(): l.fit(3, cbs=SWA(eval_every=1))
    rows = [o.split(',') for o in (tmp_path/'history.csv').read_text().splitlines()]
    assert {len(o) for o in rows}=={7} and rows[0][4]=='swa_loss' and float(rows[-1][4])>0 and rows[1][4]=='nan'

def test_show_graph_and_real_progress_bars(capsys):
    l = learner(cbs=ShowGraphCallback()); l.fit(2, cbs=SWA(eval_every=1))
    assert 'swa_accuracy' in capsys.readouterr().out

def test_gradient_accumulation():
    l,swa,spy = learner(cbs=GradientAccumulation(80)),SWA(),Spy(); fit(l, 4, cbs=[swa,spy])
    assert swa.collected==[16,17,18,19,20]; assert_is_mean(l.model, spy, swa)

def test_reduce_lr_on_plateau_is_not_fought_silently():
    with pytest.warns(UserWarning, match='ReduceLROnPlateau has no effect'): fit(learner(), 3, cbs=[SWA(), ReduceLROnPlateau(patience=1)])
    l = learner()
    with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); fit(l, 4, cbs=[SWA(swa_lr=False), ReduceLROnPlateau(patience=1, min_delta=100.)])
    assert l.opt.hypers[-1]['lr']<.1

def test_fine_tune_averages_in_the_second_phase_only():
    l,swa,phases = learner(splitter=two_groups),SWA(),[]
    class Phase(Callback):
        order = 100
        def after_fit(self): phases.append((self.learn.opt.frozen_idx, self.learn.swa.n_averaged))
    fit(l, 3, .1, freeze_epochs=2, method='fine_tune', cbs=[swa,Phase()])
    assert phases==[(1,0),(0,4)]
    l = learner(splitter=two_groups); l.freeze(); fit(l, 4, cbs=swa); assert swa.n_averaged==5   # a frozen fit by hand is averaged

@pytest.mark.parametrize('splitter', [two_groups, trainable_params])
def test_fine_tune_rows_and_trackers(splitter, tmp_path):
    l,rows = learner(splitter=splitter, path=tmp_path),[]
    class Rows(Callback):
        order = 1000
        def after_fit(self): rows.append((list(self.learn.recorder.metric_names[1:-1]), [len(v) for v in self.learn.recorder.values], self.learn.swa.n_averaged))
    for _ in range(2):     # twice: what a first fine_tune leaves behind must not confuse a second
        rows.clear()
        fit(l, 3, .1, freeze_epochs=2, method='fine_tune', cbs=[SWA(eval_every=1), SaveModelCallback(monitor='swa_loss'), EarlyStoppingCallback(monitor='swa_accuracy', patience=9), Rows()])
        names = ['train_loss','valid_loss','accuracy']
        assert [o[:2] for o in rows]==[(names, [3,3]), (names+['swa_loss','swa_accuracy'], [5,5,5])] and rows[0][2]==0 and rows[1][2]>0

def test_helpers_come_and_go_with_the_callback():
    l,swa = learner(),SWA()
    fit(l, 2, cbs=swa); assert not helpers(l)
    l.add_cb(swa); assert len(helpers(l))==2
    with l.removed_cbs(swa): assert not helpers(l)
    assert len(helpers(l))==2
    l.remove_cb(swa); assert not helpers(l) and swa.learn is None

# ---- 7. never silent

@pytest.mark.parametrize('kw,exc', [(dict(start=1.5),ValueError), (dict(start=-1),ValueError), (dict(start='x'),TypeError), (dict(swa_lr='x'),TypeError), (dict(swa_lr=True),TypeError),
    (dict(swa_lr=-.1),ValueError), (dict(swa_lr=[.1,-1.]),ValueError), (dict(cycle_len=0),ValueError), (dict(cycle_len='x'),TypeError), (dict(swa_lr_max='x'),TypeError),
    (dict(swa_lr=.1, swa_lr_max=.05),ValueError), (dict(swa_lr=False, swa_lr_max=.1),ValueError), (dict(sched=3),TypeError), (dict(sched=lambda x: x),TypeError),
    (dict(eval_every=-1),ValueError), (dict(eval_every=.5),TypeError), (dict(eval_every=True),TypeError), (dict(bn_batches=0),ValueError), (dict(bn_batches=.5),TypeError), (dict(save_to=3),TypeError)])

def test_bad_arguments(kw, exc):
    with pytest.raises(exc) as e: SWA(**kw)
    assert next(iter(kw)) in str(e.value) or 'swa_lr_max' in str(e.value)

def count_warnings(f, match):
    with warnings.catch_warnings(record=True) as ws: warnings.simplefilter('always'); f()
    return sum(match in str(w.message) for w in ws)

def test_never_started_and_nothing_collected_warn_once():
    assert count_warnings(lambda: fit(learner(), 3, cbs=SWA(start=3)), 'never start')==1
    class Stop(Callback):
        def before_batch(self):
            if self.learn.epoch==1: raise CancelFitException
    l,ref = learner(),learner(); swa = SWA()
    assert count_warnings(lambda: fit(l, 4, cbs=[swa,Stop()]), 'nothing was averaged')==1
    fit(ref, 4, cbs=Stop()); assert same(state(l.model), state(ref.model)) and swa.n_averaged==0
    for f in (swa.apply, swa.restore):
        with pytest.raises(RuntimeError, match='nothing has been averaged'): f(l)
    with pytest.raises(RuntimeError, match='no average'): swa.swa_model
    fit(l, 0, cbs=SWA())

def test_diverged_snapshots_are_left_out():
    class Poison(Callback):
        order,run_valid = 54,False
        def after_batch(self):
            if self.learn.train_iter in (17,18): self.kept = weights(self.learn.model); self.learn.model[0].weight.data[0] = math.nan
        def before_batch(self):
            if hasattr(self,'kept') and self.learn.train_iter in (17,18):
                for p,k in zip(self.learn.model.parameters(),self.kept): p.data.copy_(k)
                for s in self.learn.opt.state.values(): s.pop('grad_avg', None)
    l,swa = learner(),SWA()
    assert count_warnings(lambda: fit(l, 4, cbs=[swa,Poison()]), 'not finite after')==1
    assert all(p.isfinite().all() for p in l.model.parameters()) and 17 not in swa.collected and 18 not in swa.collected and swa.n_averaged==3

def test_changed_model_two_swas_and_missing_columns():
    class NewHead(Callback):
        def before_epoch(self):
            if self.learn.epoch==2: self.learn.model[8] = nn.Linear(64,10)
    with pytest.raises(ValueError, match='replaced'): fit(learner(), 4, cbs=[SWA(start=1, cycle_len=1), NewHead()])
    with pytest.raises(ValueError, match='two SWA'): fit(learner(), 2, cbs=[SWA(),SWA()])
    with pytest.raises(ValueError, match=r'SWA\(eval_every=1\)'): fit(learner(), 2, cbs=[SWA(), SaveModelCallback(monitor='swa_loss')])
    with pytest.raises(ValueError, match='swa_accuracy'): fit(learner(), 2, cbs=[SWA(eval_every=1), SaveModelCallback(monitor='swa_acc')])
    with pytest.raises(ValueError, match='longer than'): fit(learner(), 2, cbs=SWA(cycle_len=1))
    for kw in (dict(swa_lr=[.1], swa_lr_max=.05), dict(swa_lr=slice(.1), swa_lr_max=slice(.05)), dict(swa_lr=1, swa_lr_max=.5)):
        with pytest.raises(ValueError, match='swap them'): fit(learner(), 2, cbs=SWA(**kw))

def test_attached_and_passed_moved_and_copied(tmp_path):
    swa = SWA(); l = learner(cbs=swa)
    with pytest.raises(ValueError, match='attached to the learner already'): fit(l, 2, cbs=swa)
    fit(l, 2); assert swa.n_averaged and len(helpers(l))==2
    other = learner(cbs=swa)                                   # it moves to the other learner
    assert not helpers(l) and not hasattr(l, 'swa'); fit(l, 1); fit(other, 2); assert swa.n_averaged
    for make in (lambda: deepcopy(other), lambda: learner(cbs=deepcopy(SWA())), lambda: learner(cbs=pickle.loads(pickle.dumps(swa)))):
        l2 = make()
        assert l2.swa.n_averaged==0 and l2.swa.collected==[] and len(helpers(l2))==2
        spy = Spy(); fit(l2, 2, cbs=spy); assert_is_mean(l2.model, spy, l2.swa)

def test_learning_rate_traps():
    assert count_warnings(lambda: fit(learner(), 3, .1, method='fit_one_cycle', cbs=SWA(start=.1)), 'still warming up')==1
    assert count_warnings(lambda: fit(learner(), 3, .1, method='fit_one_cycle', cbs=SWA()), 'still warming up')==0
    assert count_warnings(lambda: fit(learner(), 3, cbs=[SWA(start=0), ParamScheduler({'lr': SchedLin(0., .1)})]), 'learning rate is 0')==1
    assert count_warnings(lambda: fit(learner(), 4, .1, cbs=SWA(swa_lr_max=.01)), 'rises within each cycle')==1
    l = learner(splitter=two_groups); spy = Spy()
    fit(l, 4, [0.,.1], cbs=[SWA(swa_lr_max=.08, sched=SchedExp), spy])
    assert np.isfinite(spy.lrs).all() and {o[0] for o in spy.lrs}=={0.} and all(p.isfinite().all() for p in l.model.parameters())

def test_warnings_come_again_in_the_next_fit():
    "Not only once in each process, as Python's default filter has it"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('default')
        for _ in range(2): fit(learner(), 2, cbs=SWA(start=5))
    assert sum('never start' in str(w.message) for w in ws)==2

def test_no_batches():
    with pytest.warns(UserWarning, match='has no batch'):
        try: fit(learner(n=10, bs=40), 2, cbs=SWA())
        except ZeroDivisionError: pass        # fastai's own

def test_annealing_tail_warns_once():
    assert count_warnings(lambda: fit(learner(), 3, method='fit_one_cycle', cbs=SWA(swa_lr=False)), 'annealing tail')==1
    assert count_warnings(lambda: fit(learner(), 3, cbs=SWA(swa_lr=False)), 'annealing tail')==0
    assert count_warnings(lambda: fit(learner(), 3, method='fit_one_cycle', cbs=SWA()), 'annealing tail')==0

def test_scripted_batchnorm_warns():
    with pytest.warns(UserWarning, match='TorchScript'):
        fit(learner(nn.Sequential(nn.Flatten(), torch.jit.script(nn.BatchNorm1d(64)), nn.Linear(64,10))), 2, cbs=SWA())

def test_no_warning_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learner(), 3, cbs=SWA(eval_every=1)); fit(learner(), 3, method='fit_one_cycle', cbs=SWA())

# ---- 8. interrupted anywhere

class Boom(Callback):
    order = 1500
    def __init__(self, ev, exc, epoch=3): self.ev,self.exc,self.at = ev,exc,epoch; setattr(self, ev, self.go)
    def go(self):
        if self.learn.epoch>=self.at and not self.learn.lock.locked(): raise self.exc('boom')

events = ['before_epoch','before_train','before_batch','after_pred','after_loss','after_batch','after_train','before_validate','after_validate','after_epoch','after_fit']
@pytest.fixture
def snapshots(monkeypatch):
    "Copies of all weights that went into an average"
    taken,update = [],average.WeightAverage.update
    def keep(self, model): taken.append(weights(model)); return update(self, model)
    monkeypatch.setattr(average.WeightAverage, 'update', keep)
    return taken

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError, CancelFitException, CancelEpochException, CancelTrainException, CancelValidException])
@pytest.mark.parametrize('ev', events)
def test_interrupted_at_every_event(ev, exc, snapshots):
    l,swa,spy = learner(),SWA(start=1, cycle_len=.4, eval_every=1),Spy()
    try: fit(l, 5, cbs=[swa, spy, Boom(ev, exc)])
    except (KeyboardInterrupt, RuntimeError, CancelFitException, CancelEpochException, CancelTrainException, CancelValidException): pass
    assert not helpers(l) and swa.learn is None
    mean = [torch.stack(o).double().mean(0) for o in zip(*snapshots)]
    assert len(snapshots)==swa.n_averaged==len(swa.collected)>=5 and not any(same(a,b) for a,b in zip(snapshots,snapshots[1:]))   # nothing went in twice
    def is_mean():
        for p,m in zip(l.model.parameters(),mean): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)
    if swa._average.applied: is_mean()
    else: assert same(weights(l.model), spy.ws[-1])
    with quiet(l): swa.apply(l)
    is_mean()
    swa.restore(l); assert same(weights(l.model), spy.ws[-1])

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError, CancelFitException, CancelEpochException, CancelTrainException, CancelValidException, CancelBatchException])
@pytest.mark.parametrize('which', ['refresh','evaluation'])
def test_interrupted_inside_our_own_passes(exc, which):
    class Inner(Callback):
        "Fails in batches that are neither training nor fastai's own validation"
        def before_batch(self):
            mine = [cb for cb in self.learn.cbs if type(cb).__name__==('BNMeterCallback' if which=='refresh' else 'ScoreMeter')]
            if mine and self.learn.iter==1: raise exc('boom')
    l,swa,spy = learner(n_valid=150),SWA(start=1, cycle_len=1, eval_every=1),Spy()
    try: fit(l, 4, cbs=[swa, spy, Inner()])
    except (KeyboardInterrupt, RuntimeError) as e: assert 'boom' in str(e) and same(weights(l.model), spy.ws[-1]) and not swa._average.applied
    else: assert issubclass(exc, (CancelFitException,CancelEpochException,CancelTrainException,CancelValidException,CancelBatchException)) and swa.n_averaged==3
    assert not helpers(l) and all(m.training==l.model.training for m in l.model.modules()) and all(m.momentum==.1 for m in l.model.modules() if hasattr(m,'momentum'))

def test_permanently_attached_and_interrupted():
    swa = SWA(start=1, cycle_len=1); l = learner(cbs=swa)
    boom = Boom('after_train', KeyboardInterrupt, 2)
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=boom)
    w = state(l.model)
    with l.no_bar(): l.validate(); l.get_preds()
    assert same(state(l.model), w) and len(helpers(l))==2
    fit(l, 3); assert swa.n_averaged==2            # starts afresh

class EpochSeed(Callback):
    "Makes an epoch depend on nothing but its number, so that a resumed run can be compared"
    order = -20
    def before_epoch(self):
        if not self.learn.lock.locked(): seed(self.learn.epoch); self.learn.dls.train.rng = random.Random(self.learn.epoch)

def test_resume_in_another_process_is_bit_identical(tmp_path):
    full,swa = learner(path=tmp_path),SWA(start=2, cycle_len=.4, eval_every=1)
    fit(full, 6, cbs=[swa,EpochSeed()])
    code = f'''
        import sys, os, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from common import *
        from fastswa.callback import SWA
        torch.set_num_threads({torch.get_num_threads()})
        class EpochSeed(Callback):
            order = -20
            def before_epoch(self):
                if not self.learn.lock.locked(): seed(self.learn.epoch); self.learn.dls.train.rng = random.Random(self.learn.epoch)
        class Kill(Callback):
            "In mid-epoch, after a collection that the saved model knows nothing of"
            order,run_valid = 300,False
            def after_batch(self):
                if self.learn.epoch==4 and self.learn.iter==3: os.kill(os.getpid(), signal.SIGKILL)
        l = learner(path={str(tmp_path)!r})
        with quiet(l): l.fit(6, cbs=[SWA(start=2, cycle_len=.4, eval_every=1, save_to={str(tmp_path/'swa.pt')!r}), EpochSeed(), SaveModelCallback(every_epoch=True, with_opt=True), Kill()])'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert r.returncode==-signal.SIGKILL, r.stderr
    l,again = learner(path=tmp_path, s=7),SWA(start=2, cycle_len=.4, eval_every=1)
    l.create_opt(); l.load('model_3', with_opt=True, weights_only=False)
    again.load(tmp_path/'swa.pt'); assert again.n_averaged==5
    fit(l, 6, start_epoch=4, cbs=[again,EpochSeed()])
    assert again.collected==swa.collected and same(state(l.model), state(full.model))
    assert not list(tmp_path.glob('*.tmp'))
    ax = again.plot_sched(); assert len(ax.lines[1].get_xdata())==len([o for o in again.collected if o>20])

def test_fit_swa_resumes(tmp_path):
    full = learner()
    with quiet(full): want = full.fit_swa(6, .1, start=2, cycle_len=1, cbs=EpochSeed())
    l = learner()
    with quiet(l):
        with pytest.raises(KeyboardInterrupt): l.fit_swa(6, .1, start=2, cycle_len=1, cbs=[EpochSeed(), Boom('after_epoch', KeyboardInterrupt, 3)], save_to=tmp_path/'s.pt')
        got = l.fit_swa(6, .1, start=2, cycle_len=1, cbs=EpochSeed(), load_from=tmp_path/'s.pt', start_epoch=4)
        assert got.collected==want.collected==[15,20,25,30] and same(state(l.model), state(full.model))
        with pytest.warns(UserWarning, match='load_from'): l.fit_swa(6, .1, start=2, cycle_len=1, start_epoch=4)
        l.fit_swa(0)

@pytest.mark.parametrize('how', ['loaded','same process'])
def test_resumed_between_two_collections_is_refreshed_all_the_same(how, tmp_path):
    "Evaluated, and cancelled, before the resumed fit has collected anything itself"
    class Stop(Callback):
        order,run_valid = 200,False
        def after_batch(self):
            if self.learn.epoch==7 and self.learn.iter==2: raise CancelFitException
    kw = dict(start=2, cycle_len=3)                            # collects after epochs 5 and 8
    l,part = learner(),SWA(**kw, save_to=tmp_path/'s.pt')
    with pytest.raises(KeyboardInterrupt): fit(l, 8, cbs=[part, Boom('after_epoch', KeyboardInterrupt, 5)])
    swa = SWA(**kw).load(tmp_path/'s.pt') if how=='loaded' else part
    swa.eval_every = 1
    fit(l, 8, start_epoch=6, cbs=[swa,Stop()])
    assert swa.n_averaged==1 and swa._average.stats.layers==[l.model[1],l.model[4]] and math.isfinite(l.recorder.values[6][-2])
    ref = net(); ref.load_state_dict(l.model.state_dict()); update_bn(ref.train(), [X[:200]])
    torch.testing.assert_close(l.model[1].running_mean, ref[1].running_mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(l.model[1].running_var,  ref[1].running_var,  atol=1e-6, rtol=1e-5)

def test_interrupted_before_statistics_and_loaded_elsewhere(tmp_path):
    "A file without statistics or layers, resumed and cancelled at once"
    l = learner(); fit(l, 4, cbs=SWA(save_to=tmp_path/'s.pt'))
    state = torch.load(tmp_path/'s.pt', weights_only=True); state.update(bn=None, layers=None)
    class Stop(Callback):
        order,run_valid = 200,False
        def after_batch(self): raise CancelFitException
    swa = SWA(start=0, cycle_len=1); swa.load_state_dict(state); fit(l, 2, cbs=[swa,Stop()])
    assert swa._average.stats.layers==[l.model[1],l.model[4]]

def test_a_file_of_another_moment_is_noticed(tmp_path):
    l,swa = learner(),SWA(start=1, cycle_len=1, save_to=tmp_path/'s.pt'); fit(l, 4, cbs=swa)
    for epoch,n in ((2,1),(4,0),(5,1)):
        f = lambda: fit(learner(), 6, start_epoch=epoch, cbs=SWA(start=1, cycle_len=1).load(tmp_path/'s.pt'))
        assert count_warnings(f, 'counted twice' if epoch<4 else 'are missing')==n
    assert count_warnings(lambda: fit(learner(), 3, cbs=SWA(start=1, cycle_len=1).load(tmp_path/'s.pt')), 'snapshots in between')==0   # a new fit, averaged together with the old one

def test_start_epoch_after_other_weights_were_loaded():
    l,swa,spy = learner(),SWA(start=1, cycle_len=1),Spy(); fit(l, 3, cbs=[swa,spy])
    for p in l.model.parameters(): p.data.zero_()              # as loading a file would
    class First(Callback):
        def before_batch(self):
            if not hasattr(self,'w'): self.w = weights(self.learn.model)
    first = First()
    with pytest.warns(UserWarning, match='a new one begins'): fit(l, 5, start_epoch=3, cbs=[swa,first])
    assert all((o==0).all() for o in first.w) and swa.n_averaged==2

def test_resume_in_the_same_process():
    full,swa = learner(),SWA(start=1, cycle_len=1); fit(full, 5, cbs=[swa,EpochSeed()])
    l,part = learner(),SWA(start=1, cycle_len=1)
    with pytest.raises(KeyboardInterrupt): fit(l, 5, cbs=[part, EpochSeed(), Boom('after_epoch', KeyboardInterrupt, 2)])
    fit(l, 5, start_epoch=3, cbs=[part,EpochSeed()])
    assert part.n_averaged==4 and same(state(l.model), state(full.model))

# ---- afterwards

def test_apply_restore_swa_model_and_copies():
    l,swa,spy = learner(),SWA(eval_every=1),Spy(); fit(l, 4, cbs=[swa,spy])
    avg = state(l.model)
    m = swa.swa_model
    assert same(state(m), avg) and not m.training and all(p.grad is None for p in m.parameters()) and m is not l.model
    swa.restore(l); own = state(l.model); assert same(weights(l.model), spy.ws[-1]) and same(state(swa.swa_model), avg)
    swa.restore(l); assert same(state(l.model), own)
    swa.apply(l); swa.apply(l); assert same(state(l.model), avg)
    assert same(state(swa.copy_to(net())), {k:avg[k] if 'tracked' not in k else torch.tensor(0) for k in avg})
    with pytest.raises(TypeError, match='give it the learner'): swa.apply(None)
    assert repr(swa)=='SWA(n_averaged=5)'

def test_swa_model_in_mid_epoch_with_persistent_workers():
    ds = torch.utils.data.TensorDataset(X[:200],Y[:200])
    data = DataLoaders(torch.utils.data.DataLoader(ds, 40, shuffle=True, num_workers=1, persistent_workers=True), torch.utils.data.DataLoader(ds, 100))
    class Mid(Callback):
        run_valid = False
        def after_batch(self):
            if self.learn.train_iter==12: self.learn.swa.swa_model
    l,spy = learner(data=data),Spy(); fit(l, 3, cbs=[SWA(start=1, cycle_len=1), Mid(), spy]); assert len(spy.ws)==15

def test_swa_model_in_the_middle_of_a_fit():
    class Mid(Callback):
        order = 100
        def after_epoch(self):
            if self.learn.epoch==2: self.m,self.w = self.learn.swa.swa_model,state(self.learn.model)
    l,mid,swa,spy = learner(),Mid(),SWA(start=1, cycle_len=1),Spy(); fit(l, 4, cbs=[mid,swa,spy])
    for p,m in zip(mid.m.parameters(), spy.mean([10,15])): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)

def test_models_that_cannot_be_copied():
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo): raise RuntimeError('no copies')
    l,swa = learner(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), NoCopy(64,10))),SWA(eval_every=1); fit(l, 3, cbs=swa)
    with pytest.raises(RuntimeError, match='cannot be copied'): swa.swa_model
    assert swa.n_averaged

def test_save_load_apply_elsewhere(tmp_path):
    l,swa = learner(),SWA(); fit(l, 4, cbs=swa); avg = state(l.model)
    swa.save(tmp_path/'a'/'swa.pt')
    other = learner(s=5); start = state(other.model)
    new = SWA().load(tmp_path/'a'/'swa.pt'); assert new.n_averaged==5
    with pytest.raises(RuntimeError, match='apply'): new.swa_model
    new.apply(other); assert same({k:v for k,v in state(other.model).items() if 'tracked' not in k}, {k:v for k,v in avg.items() if 'tracked' not in k})
    new.restore(other); assert same(state(other.model), start)
    with pytest.raises(ValueError, match='another architecture'): SWA().load(tmp_path/'a'/'swa.pt').apply(learner(plain_net()))
    with pytest.raises(ValueError, match='not the state'): SWA().load_state_dict({'n':1})
    with pytest.raises(RuntimeError, match='restore'): swa.load(tmp_path/'a'/'swa.pt')     # the model holds the present average
    swa.restore(l); swa.load(tmp_path/'a'/'swa.pt'); swa.apply(l); assert same(state(l.model), avg)

def test_trained_on_afterwards_is_noticed():
    l,swa = learner(),SWA(); fit(l, 3, cbs=swa); fit(l, 1)
    with pytest.raises(RuntimeError, match='the mean is gone'): swa.swa_model
    now = weights(l.model)
    with pytest.raises(RuntimeError, match="force=True"): swa.restore(l)
    assert same(weights(l.model), now)                          # and nothing was lost
    with pytest.warns(UserWarning, match="the mean is gone"): swa.restore(l, force=True)

def test_used_again():
    l,swa,spy = learner(),SWA(),Spy(); fit(l, 3, cbs=[swa,spy]); fit(l, 4, cbs=[swa,spy])
    assert swa.n_averaged==5; assert_is_mean(l.model, spy, swa)

def test_export_and_load(tmp_path):
    for attached in (True,False):
        swa = SWA(eval_every=1)
        l = learner(data=image_dls(), path=tmp_path, cbs=swa if attached else None)
        fit(l, 2, cbs=None if attached else swa)
        img = l.dls.train_ds[0][0]
        with l.no_bar(): want = l.predict(img)[2]
        l.export('e.pkl')
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); l2 = load_learner(tmp_path/'e.pkl')
        with l2.no_bar(): torch.testing.assert_close(l2.predict(img)[2], want)
        assert not any(isinstance(cb, SWA) for cb in l2.cbs) and not helpers(l2)      # nothing of ours, which may not be installed where it is loaded

def test_exported_file_does_not_carry_the_average(tmp_path):
    big = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,5000), nn.Linear(5000,10))
    l = learner(big(), data=image_dls(), path=tmp_path, cbs=SWA()); fit(l, 2); l.export('a.pkl')
    l = learner(big(), data=image_dls(), path=tmp_path); fit(l, 2); l.export('b.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 1.1*(tmp_path/'b.pkl').stat().st_size

# ---- 10. one extra copy

def test_one_copy_of_the_weights_at_any_moment():
    def live():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ts = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        return sum({t.untyped_storage().data_ptr():t.untyped_storage().nbytes() for t in ts if t.device.type=='cpu' and t.layout==torch.strided}.values())
    class Watch(Callback):
        order = 80
        peak = 0
        def look(self): self.peak = max(self.peak, live())
        before_train = before_validate = after_validate = after_epoch = after_fit = after_train = look
    class Look(nn.Module):
        watch = None
        def forward(self, x): self.watch and not self.training and self.watch.look(); return x     # also inside refresh and evaluation
    def run(*cbs):
        gc.collect()
        m = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,20000), Look(), nn.Linear(20000,10))
        l,w = learner(m, opt_func=SGD, bs=10, n=20, n_valid=10),Watch(); Look.watch = w
        base = live()
        fit(l, 3, cbs=[w,*cbs])
        Look.watch = None
        return w.peak-base, sum(p.numel()*4 for p in m.parameters())
    plain,size = run()
    swa = SWA(eval_every=1, start=1, cycle_len=1)
    with_,_ = run(swa)
    assert swa.n_averaged==2 and with_-plain <= 1.02*size+2**20, (with_-plain)/size

def test_averaging_adds_no_passes_without_evaluation():
    calls = []
    class Count(nn.Module):
        def forward(self, x): calls.append(self.training); return x
    l = learner(nn.Sequential(Count(), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,10))); fit(l, 3); a = len(calls); calls.clear()
    l = learner(nn.Sequential(Count(), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,10))); fit(l, 3, cbs=SWA()); assert len(calls)-a==5   # one refresh
    calls.clear(); l = learner(nn.Sequential(Count(), nn.Flatten(), nn.Linear(64,10))); fit(l, 3, cbs=SWA()); assert len(calls)==a           # no BatchNorm: none

def test_averaging_every_step_of_a_long_epoch_stays_cheap():
    "No list is copied or searched for each collection"
    swa = SWA(start=0, cycle_len=1e-9)
    swa.fit_state,swa.collected = FitState(cycles=swa_cycles(1, 200_000, 0, 1e-9)),[]
    assert len(swa.fit_state.cycles.ends)==200_000
    ids = id(swa.collected)
    class Model(nn.Linear): pass
    m = Model(2,2); swa._learn = type('L', (), dict(model=m))()
    for i in range(1,2001): swa.fit_state.done,swa.fit_state.stepped = i,True; swa.collect()
    assert id(swa.collected)==ids and swa.n_averaged==2000 and swa.fit_state.next_collect==2001
    swa._learn = None
