"`SWA(start='auto')`: when the rate is held, which window is put in, and what it never does"
import warnings
from types import SimpleNamespace

import pytest, torch
from common import *
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastswa import auto
from fastswa.auto import AutoStart, NestedMeans, WindowChoice, clearly_falls
from fastswa.callback import SWA
from fastswa.ema import EMA
from fastswa.ensemble import FGE
from test_resume import Checkpoint

def new(**kw): return SWA(start='auto', **kw)

class Falls:
    "What the look at the losses says, and how often they were looked at to find out whether the rate is held"
    def __init__(self, monkeypatch, answer):
        self.n,self.answer = 0,answer
        monkeypatch.setattr(AutoStart, 'still_falls', lambda _: self())
    def __call__(self): self.n += 1; return self.answer

# ---- whether the loss still falls

@pytest.mark.parametrize('values,want', [([3.,2.,1.], True), ([3.,2.], False), ([1.,2.,3.], False), ([1.,1.,1.], False), ([9.,8.,7.,1.,1.,1.], False),
    ([9.,1.,9.,3.,2.,1.], True), ([9.,1.,3.,2.,1.,float('nan')], False), ([3.,1.,2.,0.], False), ([], False)])
def test_clearly_falls(values, want): assert clearly_falls(values) is want

def test_falling_is_a_slope_of_four_standard_errors():
    "By hand: 0,-1,-2,... with the noise +e,-e,... has the slope -1 and a standard error in proportion to e"
    x,noise = np.arange(12.),np.array([1,-1,-1,1]*3)       # no slope of its own
    def err(e): return e*(12/10/((x-x.mean())**2).sum())**.5
    e = 1/4/err(1)                                         # here the slope is just four of them
    assert clearly_falls(-x+.99*e*noise, 1.) and not clearly_falls(-x+1.01*e*noise, 1.)

def test_only_the_last_part_counts():
    v = [*range(20,0,-1), *[0.]*10]
    assert not clearly_falls(v) and clearly_falls(v, 1.) and clearly_falls([5.]*20+list(range(10,0,-1)))

# ---- the two means

def filled(model, v):
    with torch.no_grad():
        for p in model.parameters(): p.fill_(v)
    return model

@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16])
def test_nested_means(dtype):
    m = plain_net().to(dtype); both = NestedMeans(m)
    for i in (1,2,3,6): both.update(filled(m, i))
    both.tail.n = 0                                       # the tail begins anew
    for i in (8,10): both.update(filled(m, i))
    assert (both.n,both.tail.n)==(6,2) and {float(o.flatten()[0]) for o in both.average}=={5.} and {float(o.flatten()[0]) for o in both.tail.average}=={9.}
    again = NestedMeans(m); again.load_state_dict(both.state_dict())
    assert same(again.average, both.average) and same(again.tail.average, both.tail.average) and (again.n,again.tail.n)==(6,2)
    both.keep_tail()
    assert both.n==2 and {float(o.flatten()[0]) for o in both.average}=={9.}
    again.begin_anew(); again.update(filled(m, 4))
    assert (again.n,again.tail.n)==(1,1) and same([o.to(dtype) for o in again.average], weights(m))
    from fastswa.average import WeightAverage
    old = WeightAverage(m); old.update(m)
    again.load_state_dict(old.state_dict())               # an SWA with a number as its start has no tail
    assert (again.n,again.tail.n)==(1,0)

class Took(Callback):
    "The weights wherever the average has taken some"
    order,run_valid = SWA.order+1,False
    def __init__(self, swa): self.swa,self.at,self.ws = swa,[],[]
    def look(self):
        if self.swa.collected and self.swa.collected[-1] not in self.at: self.at.append(self.swa.collected[-1]); self.ws.append(weights(self.learn.model))
    def after_batch(self): self.look()
    def after_train(self): self.look()
    def mean(self, k): return [torch.stack(o).double().mean(0) for o in zip(*self.ws[-k:])]

@pytest.mark.parametrize('epochs,cycle_len', [(4,None),(8,None),(9,.4)])
def test_what_is_averaged_is_the_points_from_a_quarter_on_and_their_last_third(epochs, cycle_len, monkeypatch):
    seen = {}
    def look(self):
        w = self.average.weights
        seen.update(n=w.n, tail=w.tail.n, all=[o.clone() for o in w.average], last=[o.clone() for o in w.tail.average])
        return 'looked',0.
    monkeypatch.setattr(WindowChoice, '__call__', look)
    l,swa = learner(),new(cycle_len=cycle_len); took = Took(swa)
    fit(l, epochs, cbs=[swa, took])
    total = epochs*5
    assert swa.fit_state.cycles.ends[-1]==total and min(swa.collected)>total/4 and len(swa.collected)==seen['n']==len(swa.fit_state.cycles.ends)
    assert seen['tail']==-(-seen['n']//3)
    for a,b in zip(seen['all'], took.mean(seen['n'])): torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    for a,b in zip(seen['last'], took.mean(seen['tail'])): torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)

# ---- the rate

@pytest.mark.parametrize('falls', [True,False])
@pytest.mark.parametrize('kw', [{}, dict(eval_every=1), dict(install=False), dict(swa_lr=.01)])
def test_a_constant_rate_is_left_alone_to_the_bit(falls, kw, monkeypatch):
    asked = Falls(monkeypatch, falls)
    plain = fit(learner(net(.3), cbs=Spy()), 5, .05); end = rng_fingerprint(plain)
    own = fit(learner(net(.3), cbs=Spy()), 5, .05, cbs=new(**kw))
    assert all(same(a,b) for a,b in zip(plain.spy.ws, own.spy.ws)) and plain.spy.lrs==own.spy.lrs and end==rng_fingerprint(own)
    assert asked.n==0

@pytest.mark.parametrize('method,kw', [('fit_one_cycle',{}), ('fit_flat_cos',dict(pct_start=.3)), ('fit_sgdr',None)])
def test_where_nothing_is_held_the_walk_is_the_same_to_the_bit(method, kw, monkeypatch):
    asked = Falls(monkeypatch, False)
    args = (2,2) if kw is None else (6,)
    ls = [fit(learner(net(.3), cbs=Spy()), *args, method=method, cbs=cb, **(kw or {})) for cb in (None,new())]
    assert all(same(a,b) for a,b in zip(ls[0].spy.ws, ls[1].spy.ws)) and ls[0].spy.lrs==ls[1].spy.lrs and asked.n>=1

@pytest.mark.parametrize('lr', [.1, slice(.01,.1)])
def test_a_rate_that_came_down_to_half_is_held_while_the_loss_falls(lr, monkeypatch):
    asked = Falls(monkeypatch, True)
    swa = new()
    plain,l = (fit(learner(splitter=two_groups, cbs=Spy()), 8, lr, method='fit_one_cycle', cbs=o) for o in (None,swa))
    theirs,ours = (np.array(o.spy.lrs) for o in (plain,l))
    peak = theirs.max(0)
    at = next(i for i in range(10, len(theirs)) if (theirs[i]<=peak/2).all())
    assert asked.n==1 and swa.auto.seen['held']==at and 'held from epoch' in swa.decision
    np.testing.assert_array_equal(ours[:at], theirs[:at])
    np.testing.assert_array_equal(ours[at:], np.repeat(theirs[at][None], len(ours)-at, 0))         # no jump: as it was there
    assert all(o>at for o in swa.collected) and swa.fit_state.held_moms is not None

def test_the_rate_to_hold_may_be_given(monkeypatch):
    Falls(monkeypatch, True)
    l,swa = learner(cbs=Spy()),new(swa_lr=.02)
    fit(l, 8, .1, method='fit_one_cycle', cbs=swa)
    lrs = np.array(l.spy.lrs)[:,0]
    assert lrs[-1]<=.02<lrs[swa.auto.seen['held']-1] and (lrs[swa.auto.seen['held']:]==lrs[-1]).all()

@pytest.mark.parametrize('kw,cbs', [(dict(swa_lr=False),[]), ({},[ReduceLROnPlateau])])
def test_a_schedule_that_is_to_be_left_alone(kw, cbs, monkeypatch):
    asked = Falls(monkeypatch, True)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        ls = [fit(learner(cbs=[Spy()]), 6, method='fit_one_cycle', cbs=[*o, *(c() for c in cbs)]) for o in ([],[new(**kw)])]
    assert ls[0].spy.lrs==ls[1].spy.lrs and asked.n==0

def test_what_is_looked_at():
    "Validation losses where there are three, else the training loss in stretches of the fit"
    l,swa = learner(),new()
    fit(l, 7, method='fit_one_cycle', cbs=swa)
    assert swa.auto.seen['valid']==pytest.approx([v[1] for v in l.recorder.values], rel=1e-6)
    assert swa.auto.stretch==1 and len(swa.auto.seen['train'])==35
    seen = []
    class Losses(Callback):
        order,run_valid = 0,False
        def after_loss(self): seen.append(float(self.learn.loss))
    l,swa = learner(n=400, bs=10),new()
    fit(l, 4, cbs=[swa, Losses()])
    k = swa.auto.stretch
    assert k==160//64 and swa.auto.seen['train']==pytest.approx([np.mean(seen[i:i+k]) for i in range(0,160,k)], rel=1e-5)

def test_short_fits_look_at_the_training_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(auto, 'clearly_falls', lambda v,*share: seen.append((len(v),*share)) or False)
    fit(learner(), 3, method='fit_one_cycle', cbs=new())
    fit(learner(), 12, method='fit_one_cycle', cbs=new())
    assert seen[0]==(10, 2/3) and (7,) in seen

# ---- the choice

def at_losses(monkeypatch, cheap, full=None):
    "The losses of the last weights, the last third and all are these; on all data those of (mean, last)"
    monkeypatch.setattr(WindowChoice, 'losses', lambda self: np.array(cheap, dtype=float))
    if full is not None: it = iter(full); monkeypatch.setattr(WindowChoice, 'valid_loss', lambda self: next(it))

@pytest.mark.parametrize('cheap,full,n,said', [([1,2,3],None,1,'the last weights'), ([2,1,3],(1.,2.),4,'the mean of the last 4'), ([3,2,1],(1.,2.),10,'the mean of all 10'),
    ([3,2,1],(2.,1.),1,'the last weights'), ([1,1,1],None,1,'the last weights'), ([float('nan'),2,1],(1.,float('nan')),10,'the mean of all 10'),
    ([3,2,1],(float('nan'),1.),1,'the last weights'), ([3,2,1],(1.,1.),10,'the mean of all 10')])
def test_the_lowest_loss_is_put_in(cheap, full, n, said, monkeypatch):
    at_losses(monkeypatch, cheap, full)
    l,swa = learner(cbs=Spy()),new(); took = Took(swa)
    fit(l, 8, cbs=[swa, took])
    assert said in swa.decision and swa.n_averaged==n==len(swa.collected)
    want = took.mean(n)
    assert swa._average.applied
    for a,b in zip(weights(l.model), want): torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    if n==1: assert same(weights(l.model), l.spy.ws[-1])
    swa.restore(l)
    assert same(weights(l.model), l.spy.ws[-1])

@pytest.mark.parametrize('model', [net,plain_net])
@pytest.mark.parametrize('args,method,lr', [((2,),'fit',.1), ((9,),'fit',.3), ((3,),'fit_one_cycle',.1), ((1,),'fine_tune',.1)])
def test_never_worse_than_the_last_weights_on_validation_data(args, method, lr, model):
    l,swa = learner(model(), lr=lr),new()
    fit(l, *args, method=method, cbs=swa)
    with quiet(l): df = swa.compare(l); loss = l.validate()[0]
    assert loss<=df.loss.iloc[1]*(1+1e-6) and loss==pytest.approx(df.loss.iloc[2], rel=1e-6)

def test_the_losses_of_the_choice_are_those_of_the_candidates(monkeypatch):
    "With few training data all of them are looked at, so they are what validate says"
    found = {}
    own = WindowChoice.losses
    def look(self):
        res = own(self)
        found.update(losses=res, means=[weights(self.model), *([o.clone() for o in w.average] for w in list(self.candidates().values())[1:])])
        return res
    monkeypatch.setattr(WindowChoice, 'losses', look)
    l = learner(drop_last=False, n_valid=65); fit(l, 6, .2, cbs=new(install=False))      # the second batch has one item
    assert len(found['losses'])==3
    for ws,loss in zip(found['means'], found['losses']):
        with torch.no_grad():
            for p,w in zip(l.model.parameters(), ws): p.copy_(w)
        with quiet(l): l.update_bn(); assert l.validate()[0]==pytest.approx(loss, rel=1e-5)

def test_without_validation_data(monkeypatch, capsys):
    for falls,n in ((True,1),(False,10)):
        shares = []
        monkeypatch.setattr(auto, 'clearly_falls', lambda v,*share: shares.extend(share) or falls)
        l,swa = learner(n_valid=0, metrics=None),new()
        fit(l, 6, cbs=swa)
        assert swa.n_averaged==n and 'no validation data' in swa.decision and shares==[2/3]
    monkeypatch.undo()
    l,swa = learner(n_valid=0, metrics=None, n=40),new()
    fit(l, 2, cbs=swa)                                      # two losses tell nothing
    assert swa.n_averaged==1

@pytest.mark.parametrize('stop', [0,3])
def test_stopped_before_the_first_point(stop):
    class Stop(Callback):
        order = 2000
        def after_batch(self):
            if self.training and self.learn.iter==stop: raise CancelFitException()
    l,swa = learner(cbs=Spy()),new()
    fit(l, 20, cbs=[swa, Stop()])
    assert swa.n_averaged==1 and 'the last weights' in swa.decision and same(weights(l.model), l.spy.ws[-1]) and len(l.spy.ws)==stop+1

def test_the_choice_fails_and_the_training_is_there(monkeypatch):
    def fail(self): raise ValueError('no idea')
    monkeypatch.setattr(WindowChoice, 'losses', fail)
    l,swa = learner(),new()
    with pytest.warns(UserWarning, match='no idea.*that of 10 snapshots'): fit(l, 8, cbs=swa)
    assert swa.n_averaged==10 and swa.decision is None and swa._average.applied

def test_it_says_so_once(capsys):
    l,swa = learner(),new()
    with l.no_bar(): l.fit(4, cbs=swa)
    out = [o for o in capsys.readouterr().out.splitlines() if o.startswith('SWA(')]
    assert out==[f"SWA(start='auto'): {swa.decision}"]
    fit(learner(), 4, cbs=new())
    assert 'SWA(' not in capsys.readouterr().out          # no_logging

# ---- with others

def test_watched_and_saved_and_beside_others(tmp_path):
    l,swa,fge,ema = learner(path=tmp_path),new(eval_every=1, save_to=tmp_path/'s.pt'),FGE(),EMA(install=False)
    fit(l, 6, cbs=[swa, fge, ema])
    assert fge.collected==list(swa.fit_state.cycles.ends) and ema.n_averaged
    loaded = SWA(start='auto').load(tmp_path/'s.pt')
    assert loaded.n_averaged==swa.n_averaged
    m = net(); loaded.copy_to(m)
    assert same(weights(m), weights(l.model))              # the file has the choice

def test_save_model_has_the_last_word(tmp_path):
    l,swa = learner(path=tmp_path),new(eval_every=1)
    fit(l, 6, cbs=[swa, SaveModelCallback('swa_loss')])
    assert swa.decision is None and swa._average.applied

def test_early_stopping():
    l,swa = learner(),new()
    fit(l, 20, cbs=[swa, EarlyStoppingCallback(min_delta=9., patience=8)])
    assert swa.decision and len(l.recorder.values)==9

@pytest.mark.parametrize('how', ['file','same object'])
@pytest.mark.parametrize('falls', [True,False])
@pytest.mark.parametrize('epoch', [3,6])                   # before and after the rate is held
def test_goes_on_as_it_would_have(how, falls, epoch, tmp_path, monkeypatch):
    Falls(monkeypatch, falls)
    make = lambda: learner(net(.3))
    full,whole = make(),new(); fit(full, 8, .2, method='fit_one_cycle', cbs=whole)
    l,swa,point = make(),new(save_to=tmp_path/'s.pt'),Checkpoint(epoch)
    with pytest.raises(KeyboardInterrupt): fit(l, 8, .2, method='fit_one_cycle', cbs=[swa, point])
    if how=='file': l,swa = make(),new().load(tmp_path/'s.pt')
    point.put(l)
    if how=='same object': l.cbs = l.cbs.filter(lambda o: o is not swa)
    fit(l, 8, .2, method='fit_one_cycle', cbs=[swa, point.resume()], start_epoch=epoch+(how!='never'))
    assert swa.decision==whole.decision and swa.auto.seen==whole.auto.seen and swa.n_averaged==whole.n_averaged and same(state(l.model), state(full.model))

def test_bad_arguments():
    with pytest.raises(TypeError, match='start'): SWA(start='soon')
    with pytest.raises(ValueError, match="swa_lr_max has no use with start='auto'"): new(swa_lr_max=.1)
    with pytest.raises(ValueError, match='fit_swa plans its rates'): learner().fit_swa(3, start='auto')

def test_two_extra_sets_of_weights():
    l,swa = learner(),new(); fit(l, 4, cbs=swa)
    w = swa._average.weights
    assert sum(o.numel() for o in [*w.shadow.tensors, *w.tail.shadow.tensors])==2*sum(p.numel() for p in l.model.parameters())

def test_the_picture_has_no_gaps():
    l,swa = learner(),new(); fit(l, 4, method='fit_one_cycle', cbs=swa)
    ax = swa.plot_sched()
    assert not np.isnan(ax.lines[0].get_ydata()).any()

def test_validate_is_no_fit():
    l,swa = learner(cbs=new()),None
    swa = l.swa; fit(l, 4)
    kept,seen = swa.n_averaged,dict(swa.auto.seen)
    with quiet(l): l.validate(); l.get_preds()
    assert swa.n_averaged==kept and swa.auto.seen==seen

# ---- found in review

def test_the_choice_hears_all_validation_data_and_some_training_data(monkeypatch):
    "Folders are often sorted by class, and fastai does not shuffle them"
    seen,own = [],auto.measure_bn
    monkeypatch.setattr(auto, 'measure_bn', lambda learn, layers, n, **kw: seen.append(n) or own(learn, layers, n, **kw))
    class Count(Callback):
        n = 0
        def after_pred(self):
            if not self.training: Count.n += len(self.pred)
    tr,va = list(zip(X[:200],Y[:200])),[(X[0],i//250) for i in range(2500)]
    l = learner(data=DataLoaders(FastaiDataLoader(tr, bs=30, shuffle=True, drop_last=True), FastaiDataLoader(va, bs=50)))
    c = Count(); l.add_cb(c)
    def look(self): c.n = 0; Count.n = 0; self.losses(); seen.append(Count.n); return 'looked',0.
    monkeypatch.setattr(WindowChoice, '__call__', look)
    fit(l, 2, cbs=new())
    assert seen[:3]==[67]*3 and seen[3]==3*(2500+180)          # 67 batches of 30 are 2010 items, and there are 6

@pytest.mark.parametrize('epochs,start,same_fit', [(20,0,False), (5,0,False), (5,3,False), (8,0,True)])
def test_what_another_fit_has_seen_is_forgotten(epochs, start, same_fit, tmp_path, monkeypatch):
    asked = Falls(monkeypatch, True)
    first = new(); fit(learner(), 8, .2, method='fit_one_cycle', cbs=first); first.save(tmp_path/'s.pt')
    assert asked.n==1 and first.auto.seen['held']
    l,swa = learner(cbs=Spy()),new().load(tmp_path/'s.pt')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                     # the moments do not meet, which is told
        fit(l, epochs, .2, method='fit_one_cycle', cbs=swa, start_epoch=start)
    assert asked.n==2 and swa.auto.seen['held'] and len(swa.auto.seen['valid'])==epochs-start and len({tuple(o) for o in l.spy.lrs})>1

def test_a_state_that_was_loaded_stays_as_it_is(tmp_path, monkeypatch):
    Falls(monkeypatch, True)
    l,swa,point = learner(),new(save_to=tmp_path/'s.pt'),Checkpoint(3)
    with pytest.raises(KeyboardInterrupt): fit(l, 8, .2, method='fit_one_cycle', cbs=[swa, point])
    sd = torch.load(tmp_path/'s.pt'); kept = {k:list(v) if isinstance(v, list) else v for k,v in sd['auto'].items()}
    runs = []
    for _ in range(2):
        l,again = learner(cbs=Spy()),new(); again.load_state_dict(sd); point.put(l)
        fit(l, 8, .2, method='fit_one_cycle', cbs=[again, point.resume()], start_epoch=4)
        runs.append((again.decision, l.spy.lrs))
        assert sd['auto']==kept
    assert runs[0]==runs[1]

@pytest.mark.parametrize('bad', ['x', {}, dict(valid=[], train=[], decided=0, held=0, lrs=[]), dict(valid=['a'], train=[], decided=0, held=0, lrs=[], total=9),
    dict(valid=[], train=[], decided=-1, held=0, lrs=[], total=9)])
def test_a_state_that_has_seen_what_it_cannot_is_refused(bad):
    l,swa = learner(),new(); fit(l, 2, cbs=swa); swa.restore(l)
    with pytest.raises(ValueError, match='automatic start'): new().load_state_dict(dict(swa.state_dict(), auto=bad))

def test_interrupted_within_an_epoch_it_forgets_what_is_made_again(monkeypatch):
    Falls(monkeypatch, False)
    class Stop(Callback):
        order = 2000
        def after_batch(self):
            if self.training and self.epoch==4 and self.iter==2: raise KeyboardInterrupt
    l,swa = learner(),new()
    with pytest.raises(KeyboardInterrupt): fit(l, 8, cbs=[swa, Stop()])
    l.cbs = l.cbs.filter(lambda o: not isinstance(o, (SWA,Stop)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(l, 8, cbs=swa, start_epoch=4)
    assert len(swa.auto.seen['train'])==40 and len(swa.auto.seen['valid'])==8

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_losses_in_half_precision_add_up(dtype):
    l,swa = learner(),new(); fit(l, 2, cbs=swa)
    swa.auto.stretch,swa.auto.seen['train'] = 3000,[]
    for _ in range(3000): swa.auto.see_batch(torch.tensor([5.,5.], dtype=dtype))       # one for each item: their mean
    assert swa.auto.seen['train']==[5.]

def test_weights_that_are_no_numbers_are_not_taken(monkeypatch):
    "A divergence in the end: the mean is finite, and stays"
    class Diverge(Callback):
        order = 2000
        def after_train(self):
            if self.epoch==7:
                with torch.no_grad(): next(self.model.parameters()).fill_(float('nan'))
    l,swa = learner(plain_net()),new()
    fit(l, 8, cbs=[swa, Diverge()])
    assert swa.n_averaged>1 and all(torch.isfinite(p).all() for p in l.model.parameters())

@pytest.mark.parametrize('monitor,loss,stays', [('valid_loss',1e-9,False), ('valid_loss',1e9,True), ('accuracy',1e-9,True)])
def test_the_best_that_was_loaded_stays_unless_the_choice_is_better(monitor, loss, stays, monkeypatch, tmp_path):
    own = WindowChoice.__call__
    monkeypatch.setattr(WindowChoice, '__call__', lambda self: (own(self)[0],loss))
    l,swa = learner(path=tmp_path),new()
    fit(l, 5, cbs=[swa, SaveModelCallback(monitor)])
    assert swa._average.applied!=stays and ('stay in the model' in swa.decision)==stays
    if stays:
        best = learner(path=tmp_path); best.load('model')
        assert same(state(l.model), state(best.model))
        swa.apply(l); assert swa._average.applied

def test_names_of_the_candidates():
    l,swa = learner(),new(install=False); fit(l, 8, cbs=swa)
    c = WindowChoice(SimpleNamespace(learn=l, _average=swa._average))
    w = swa._average.weights
    for n,tail,want in ((10,4,['the last weights','the mean of the last 4 snapshots','the mean of all 10 snapshots']), (3,1,['the last weights','the mean of all 3 snapshots']),
                        (1,1,['the last weights']), (4,4,['the last weights','the mean of all 4 snapshots'])):
        w.n,w.tail.n = n,tail
        assert list(c.candidates())==want

def test_the_last_weights_are_looked_at_with_statistics_of_their_own(monkeypatch):
    "In the end, on all validation data, what counts is not the running statistics that training left behind"
    at_losses(monkeypatch, [3,2,1])
    class Spoil(Callback):
        order = 2000
        def after_train(self):
            for m in self.model.modules():
                if hasattr(m, 'running_mean'): m.running_mean.add_(3.)
    l,swa = learner(),new(install=False); fit(l, 3, cbs=[swa, Spoil()])
    with quiet(l): df = swa.compare(l)
    assert df.loss.iloc[0]>2*df.loss.iloc[1]              # spoiled (20 seeds, two instruction sets: 4.2 to 5.6 times), and yet:
    assert df.loss.iloc[2]<=df.loss.iloc[1]*(1+1e-6)
    said = float(swa.decision.split('validation loss ')[1].split()[0])
    assert said==pytest.approx(df.loss.iloc[2], rel=1e-3)

def test_the_tail_of_a_walk_that_is_held(monkeypatch):
    Falls(monkeypatch, True)
    at_losses(monkeypatch, [3,1,2], (1.,2.))
    l,swa = learner(),new(); took = Took(swa)
    fit(l, 12, .2, method='fit_one_cycle', cbs=[swa, took])
    n = len([o for o in swa.fit_state.cycles.ends if o>swa.auto.seen['held']])
    assert swa.n_averaged==-(-n//3)>1
    for a,b in zip(weights(l.model), took.mean(swa.n_averaged)): torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)

def test_rates_that_never_came_down_are_not_held(monkeypatch):
    asked = Falls(monkeypatch, True)
    l,swa = learner(cbs=Spy()),new(swa_lr=.1); fit(l, 5, .05, cbs=swa)          # at a rate below swa_lr from the beginning
    assert asked.n==0 and {o[0] for o in l.spy.lrs}=={.05}
    l,swa = learner(splitter=two_groups, cbs=Spy()),new()                        # one group's rate falls, the other's doesn't
    class One(Callback):
        order = 0
        def before_batch(self): self.learn.opt.set_hyper('lr', [.1, .1*(1-self.pct_train)])
    fit(l, 5, .1, cbs=[swa, One()])
    assert asked.n==0

def test_a_rate_that_fell_before_the_first_point_is_looked_at_there(monkeypatch):
    asked = Falls(monkeypatch, True)
    l,swa = learner(cbs=Spy()),new()
    from fastai.callback.schedule import ParamScheduler,SchedExp
    fit(l, 8, cbs=[swa, ParamScheduler({'lr':SchedExp(.1,1e-4)})])
    first = swa.fit_state.cycles.ends[0]
    assert asked.n==1 and swa.auto.seen['decided']==first and (np.array(l.spy.lrs)[first:]==l.spy.lrs[first]).all()

def test_bn_batches_and_no_words_of_the_choice(monkeypatch):
    seen,own = [],auto.measure_bn_within_memory
    monkeypatch.setattr(auto, 'measure_bn_within_memory', lambda learn, layers, n=None, *a, **kw: seen.append(n) or own(learn, layers, n, *a, **kw))
    at_losses(monkeypatch, [3,2,1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learner(), 5, cbs=new(bn_batches=2))
    assert seen==[2,2]

def test_without_a_recorder(monkeypatch):
    l,swa = learner(),new(); l.remove_cbs([l.recorder])
    fit(l, 4, cbs=swa)
    assert swa.auto.seen['valid']==[] and swa.auto.seen['train'] and swa.n_averaged and swa.decision

def test_no_fit_is_seen():
    l = learner(cbs=new()); fit(l, 2); seen = dict(l.swa.auto.seen, train=list(l.swa.auto.seen['train']))
    with quiet(l): l.lr_find(num_it=5, show_plot=False)
    assert l.swa.auto.seen==seen

def test_cycle_len_longer_than_what_is_left():
    l,swa = learner(),new(cycle_len=3); fit(l, 2, cbs=swa)
    assert swa.fit_state.cycles.ends==(10,) and swa.decision

def test_a_third_of_eleven_is_four():
    v = [9.]*8+[3.,2.,1.1]
    assert clearly_falls(v[-3:], 1.) and not clearly_falls(v[-4:], 1.) and not clearly_falls(v)

@pytest.mark.parametrize('mean', [True,False])
@pytest.mark.parametrize('stop', [None,3])
def test_frozen_batchnorm_keeps_its_statistics(mean, stop, monkeypatch):
    "Whatever is taken, also in a fit that was stopped before the first point; the model is in evaluation mode then"
    from fastai.callback.training import BnFreeze
    at_losses(monkeypatch, [2,1,1] if mean else [1,2,2], (1.,2.))
    class Stop(Callback):
        order = 2000
        def after_validate(self):
            if self.epoch==stop: raise CancelFitException()
    l,swa = learner(cbs=BnFreeze()),new()
    for m in (l.model[1],l.model[4]): m.requires_grad_(False); m.running_mean.fill_(.5); m.running_var.fill_(2.)
    fit(l, 8 if stop is None else 20, cbs=[swa, Stop()])
    assert swa.decision and swa._average.applied and (swa.n_averaged>1)==(mean and stop is None)
    for m in (l.model[1],l.model[4]): assert (m.running_mean==.5).all() and (m.running_var==2).all()
