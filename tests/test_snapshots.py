"Snapshots: which are taken, the averages of them by hand, the choice, and that none of it leaves a trace"
import pickle
from copy import deepcopy

import matplotlib.pyplot as plt
import pytest, torch
from common import *
from fastai.metrics import rmse
from fastai.callback.training import BnFreeze
from fastswa.callback import SWA
from fastswa.ema import EMA, EMAverage
from fastswa.ensemble import FGE, SnapshotEnsemble
from fastswa.members import swapped_state
from fastswa.snapshots import Snapshots, average_of, candidates, ema_counts
from fastswa.surface import low_is_good
from test_compare import Walk, linear
from test_ema import by_hand as ema_by_hand

def fitted(snaps=None, n=4, cbs=(), learn=None, **kw):
    l,snaps,spy = learner(**kw) if learn is None else learn,Snapshots() if snaps is None else snaps,Spy()
    fit(l, n, cbs=[snaps, spy, *cbs])
    return l,snaps,spy

def calm(f, learn, *args, **kw):
    with quiet(learn): return f(learn, *args, **kw)

def holds(l, ws, tol=1e-6):
    for p,w in zip(l.model.parameters(), ws, strict=True): torch.testing.assert_close(p.detach().double(), w.double(), atol=tol, rtol=tol)

def weighted(spy, its, counts): return [sum(c*spy.ws[i-1][k].double() for i,c in zip(its,counts))/sum(counts) for k in range(len(spy.ws[0]))]

# ---- which are taken: 5 iterations in an epoch

@pytest.mark.parametrize('kw,n,its', [
    (dict(), 4, range(2,21,2)), (dict(), 11, range(5,56,5)), (dict(), 1, range(1,6)), (dict(start=.5), 4, range(11,21)), (dict(start=1), 4, [6,8,9,11,12,14,15,17,18,20]),
    (dict(every=1), 4, [5,10,15,20]), (dict(every=.4), 2, [2,4,6,8,10]), (dict(every=1.5), 4, [12,20]), (dict(every=3), 4, [20]), (dict(every=9), 2, [10]), (dict(every=9, start=1), 2, [10]),
    (dict(keep=3), 4, [16,18,20]), (dict(every=1, keep=9), 3, [5,10,15])])
def test_points(kw, n, its):
    l,snaps,spy = fitted(Snapshots(**kw), n)
    its = list(its)
    assert snaps.collected[-len(its):]==its and snaps.n_members==len(its) and ('keep' in kw or len(snaps.collected)==len(its))
    for m,i in zip(snaps.members, its): assert all(torch.equal(m[k],w) for (k,_),w in zip(l.model.named_parameters(), spy.ws[i-1]))

@pytest.mark.parametrize('other,its', [(lambda: SWA(.5, cycle_len=1, check=False), [15,20]), (lambda: SnapshotEnsemble(3), [7,14,20]), (lambda: FGE(start=.4, cycle_len=.8), None), (lambda: SWA(swa_lr=False), list(range(2,21,2))), (lambda: EMA(), list(range(2,21,2)))])
def test_at_the_ends_of_others_cycles(other, its):
    o = other()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        l,snaps,spy = fitted(cbs=[o])
    assert snaps.collected==(o.collected if its is None else its)

@pytest.mark.parametrize('n', [4,7,12])
@pytest.mark.parametrize('kw', [dict(), dict(start=.5)])
def test_who_leads_without_cycles_changes_no_points(n, kw):
    alone = fitted(Snapshots(**kw), n)[1]
    for leader in (SWA(start='auto'), SWA(start=n)):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                      # the other one never starts
            snaps = fitted(Snapshots(**kw), n, cbs=[leader])[1]
        assert snaps.collected==alone.collected==list(alone.fit_state.cycles.ends) and snaps.n_members==alone.n_members

def test_what_was_asked_for_comes_before_others_cycles():
    assert fitted(Snapshots(every=1), cbs=[SWA(.5, cycle_len=.6, check=False)])[1].collected==[5,10,15,20]
    assert fitted(Snapshots(start=3), cbs=[SnapshotEnsemble(4)])[1].collected==[20]

def test_the_very_weights_of_swa():
    swa = SWA(.5, check=False)
    l,snaps,spy = fitted(cbs=[swa])
    want = weights(swa.swa_model)
    assert snaps.collected==swa.collected
    with pytest.raises(RuntimeError, match='swa.restore'): calm(snaps.average, l)
    swa.restore(l)
    calm(snaps.average, l)
    holds(l, want)
    snaps.restore(l); holds(l, spy.ws[-1])

@pytest.mark.parametrize('kw', [dict(), dict(every=.4, keep=2), dict(bn_batches=None)])
def test_the_walk_is_the_one_without(kw, tmp_path):
    snaps = Snapshots(**kw, keep_on=tmp_path/'m')
    def go(*cbs):
        l,spy = learner(net(.3)),Spy()
        fit(l, 4, cbs=[spy, *cbs], method='fit_one_cycle')
        return spy.lrs,spy.ws,rng_fingerprint(l),state(l.model)
    a,b = go(),go(snaps)
    assert a[0]==b[0] and all(map(same, a[1], b[1])) and a[2]==b[2] and same(a[3], b[3])
    assert not snaps.sets_lr([]) and snaps.rates(3) is None

class Look(Callback):
    def after_epoch(self):
        if not self.learn.lock.locked(): self.learn.validate()

def test_nothing_but_a_fit_collects():
    l,snaps,spy = fitted(cbs=[Look()])
    assert snaps.collected==list(range(2,21,2)) and snaps.n_members==10
    l.add_cb(snaps)
    with quiet(l):
        l.validate(); l.get_preds(); l.lr_find(show_plot=False)
    assert snaps.n_members==10 and snaps.collected==list(range(2,21,2))

# ---- averages by hand

@pytest.mark.parametrize('kw,counts', [
    (dict(), [1]*10), (dict(last=1), [1]), (dict(last=3), [1]*3), (dict(last=10), [1]*10),
    (dict(weights=range(10)), range(10)), (dict(weights=[3,0,0,1,0,0,2.5,0,0,0]), [3,0,0,1,0,0,2.5,0,0,0]), (dict(weights=torch.tensor([0,0,.5,0,0,0,0,0,0,0])), [0,0,1]+[0]*7)])
def test_average_by_hand(kw, counts):
    l,snaps,spy = fitted()
    assert calm(snaps.average, l, **kw) is snaps
    holds(l, weighted(spy, snaps.collected[-len(counts):], counts))
    assert snaps.n_averaged==sum(c!=0 for c in counts)
    snaps.restore(l)
    assert same(weights(l.model), spy.ws[-1])

@pytest.mark.parametrize('half_life', [.05,.2,1])
def test_exponential_by_hand(half_life):
    l,snaps,spy = fitted()
    calm(snaps.average, l, half_life=half_life)
    holds(l, ema_by_hand([spy.ws[i-1] for i in snaps.collected], .5**(1/(half_life*10))))

@pytest.mark.parametrize('n', [1,2,3,30])
@pytest.mark.parametrize('half_life', [1e-9,.01,.1,1.,7])
def test_exponential_counts_make_an_emaverage(n, half_life):
    "To rounding, warm-up included: of made-up places, the first of which would be seen anywhere"
    m,g = nn.Linear(1,1,bias=False),torch.Generator().manual_seed(n)
    ema,ws = EMAverage(m, decay=.5**(1/(half_life*n))),torch.cat([torch.tensor([100.]), torch.randn(n-1, generator=g)])
    for w in ws:
        nn.init.constant_(m.weight, w)
        ema.update(m)
    counts = ema_counts(n, half_life)
    assert len(counts)==n and counts.sum()==pytest.approx(1) and counts@ws.double().numpy()==pytest.approx(ema.average[0].item(), rel=1e-5, abs=1e-5)
    members = [dict(state={'weight':w.view(1,1)}) for w in ws]
    with torch.no_grad(): avg = average_of(m, members, half_life=half_life)
    torch.testing.assert_close(avg.average[0], ema.average[0], rtol=1e-5, atol=1e-5)

def test_each_counts_once_and_the_first_weights_do_not():
    # made-up places: 1 to 12 after each iteration, 100 before
    l = linear(n=60, n_valid=100)
    with torch.no_grad(): l.model.weight.fill_(100)
    snaps = Snapshots(every=1/3)
    fit(l, 4, cbs=[snaps, Walk(range(1,13))])
    calm(snaps.average, l); assert l.model.weight.item()==pytest.approx(6.5)
    calm(snaps.average, l, last=4); assert l.model.weight.item()==pytest.approx(10.5)
    calm(snaps.average, l, weights=[1]+[0]*10+[1]); assert l.model.weight.item()==pytest.approx(6.5)
    snaps.restore(l); assert l.model.weight.item()==12

def test_statistics_are_those_of_all_training_data():
    l,snaps,spy = fitted(drop_last=False, shuffle=False)
    own = state(l.model)
    calm(snaps.average, l, last=3)
    now = state(l.model)
    with quiet(l): l.update_bn()
    for k,v in l.model.state_dict().items(): torch.testing.assert_close(now[k], v)
    for k,v in now.items(): l.model.state_dict()[k].copy_(v)
    calm(snaps.average, l, last=3, bn_batches=1)
    assert not torch.equal(now['1.running_mean'], l.model[1].running_mean)
    snaps.restore(l)
    assert same(state(l.model), own)

def test_layers_frozen_in_the_fit_stay():
    l = learner(shuffle=False, drop_last=False)
    for p in l.model[1].parameters(): p.requires_grad_(False)
    l.model[1].running_mean.fill_(.3)
    snaps = Snapshots()
    fit(l, 2, cbs=[snaps, BnFreeze()])                          # of this fit only
    for f in (snaps.average, partial(snaps.choose, ax=False), partial(snaps.average, best=2)):
        calm(f, l)
        assert (l.model[1].running_mean==.3).all() and (l.model[4].running_mean!=0).all()
    df = calm(snaps.choose, l, ax=False)                        # scored so, too
    calm(snaps.average, l, last=1)
    with quiet(l): assert df.loss.iloc[0]==pytest.approx(l.validate()[0], rel=.02)

def test_one_takes_the_place_of_another():
    l,snaps,spy = fitted()
    for k in 3,10,1,4:
        calm(snaps.average, l, last=k)
        holds(l, spy.mean(snaps.collected[-k:]))
        with quiet(l): df = snaps.compare(l)
        assert list(df.index)[2]=='average' and snaps.n_averaged==k
        with quiet(l): assert df.loss.iloc[2]==pytest.approx(l.validate()[0], rel=1e-5)
    snaps.restore(l); assert same(weights(l.model), spy.ws[-1])
    snaps.apply(l); holds(l, spy.mean(snaps.collected[-4:]))

def test_compare_measures_the_last_weights_on_as_much():
    l,snaps,spy = fitted(Snapshots(bn_batches=1), shuffle=False)
    calm(snaps.average, l, last=1)
    df = calm(snaps.compare, l)
    assert df.loss.iloc[1]==pytest.approx(df.loss.iloc[2], rel=1e-5) and df.loss.iloc[0]!=df.loss.iloc[1]

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.bn,self.out = nn.Linear(64,64),nn.Linear(64,64),nn.BatchNorm1d(64),nn.Linear(64,10)
        self.b.weight = self.a.weight
    def forward(self, x): return self.out(self.bn(self.b(self.a(x.flatten(1)))))

class Floats(Callback):
    "Pictures as a half-precision model takes them"
    order = 0
    def before_batch(self): self.learn.xb = (self.learn.xb[0].bfloat16(),)
    def after_pred(self): self.learn.pred = self.learn.pred.float()

def normed(): return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64,10)))

@pytest.mark.parametrize('make', [plain_net, Tied, normed])
def test_models_of_other_kinds(make):
    seed()
    l,snaps,spy = fitted(learn=learner(make(), lr=.01))
    calm(snaps.average, l, last=4); holds(l, spy.mean(snaps.collected[-4:]))
    calm(snaps.choose, l, ax=False)
    snaps.restore(l); assert same(weights(l.model), spy.ws[-1])
    if make is Tied: assert l.model.a.weight is l.model.b.weight

def test_a_half_precision_model_is_averaged_in_float32():
    l,snaps,spy = fitted(learn=learner(plain_net().bfloat16(), cbs=Floats(), opt_func=SGD))
    calm(snaps.average, l)
    mean = spy.mean(snaps.collected)
    for a,p,m in zip(snaps._average.weights.average, l.model.parameters(), mean): torch.testing.assert_close(a.double(), m, atol=1e-6, rtol=1e-6); assert p.dtype==torch.bfloat16 and torch.equal(p, a.bfloat16())
    snaps.restore(l); assert same(weights(l.model), spy.ws[-1])

# ---- the best by themselves: the loss of a place w is (w-2)^2 times the mean of x^2

def at_places(places, metrics=None, **kw):
    l = linear(n=20*len(places), metrics=metrics, **kw)
    snaps = Snapshots(every=1/len(places))
    fit(l, 1, cbs=[snaps, Walk(places)])
    assert snaps.n_members==len(places)
    return l,snaps

def slope_right(inp, targ): return -((inp-targ)**2).mean()       # higher is better

@pytest.mark.parametrize('metric', [None, '_rmse', 'slope_right'])
def test_the_best(metric):
    l,snaps = at_places([9.,2.5,7.,1.8,3.,-4.], metrics=[rmse, slope_right])
    for k,want in (1,1.8),(2,(1.8+2.5)/2),(3,(1.8+2.5+3)/3):
        calm(snaps.average, l, best=k, metric=metric, low=False if metric=='slope_right' else None)
        assert l.model.weight.item()==pytest.approx(want) and snaps.n_averaged==k
    snaps.restore(l); assert l.model.weight.item()==-4

def test_whether_low_is_good_is_known_or_asked_for():
    def nll(inp, targ): return ((inp-targ)**2).mean()
    def r2_score(inp, targ): return -nll(inp, targ)
    def gain(inp, targ): return nll(inp, targ)
    l,snaps = at_places([9.,2.5,7.,-4.], metrics=[gain, nll, r2_score])
    def best(**kw):
        calm(snaps.average, l, best=1, **kw)
        return l.model.weight.item()
    assert best(metric='nll')==best(metric='r2_score')==2.5
    assert best(metric='gain', low=True)==2.5 and best(metric='gain', low=False)==9
    assert best(metric='nll', low=False)==9 and best(metric='r2_score', low=True)==9     # what one says counts
    found = state(l.model)
    for metric in 'gain',None:
        with pytest.raises(ValueError, match="metric='gain'.*low=True.*low=False"): best(metric=metric)
    for kw in dict(low=True),dict(low=True, metric=False):
        with pytest.raises(ValueError, match='low beside metric'): best(**kw)
    with pytest.raises(ValueError, match='low beside metric'): calm(snaps.average, l, last=2, low=True)
    with pytest.raises(TypeError, match="low='yes'"): best(metric='nll', low='yes')
    assert same(state(l.model), found)

@pytest.mark.parametrize('low,names', [
    (True, 'nll ece brier_score brier_score_loss mape smape err mean_absolute_error mse mae msle exp_rmspe perplexity error_rate wer cer hamming_loss valid_loss MyLoss top_5_error my_err'),
    (False, 'accuracy score f1 f1_score fbeta_score precision recall_score r2 r2_score roc_auc_score dice_multi jaccard_coeff pearson_corr_coef corr matthews_corrcoef kappa bleu top_k top5 top_k_accuracy foreground_acc explained_variance iou balanced_accuracy_score'),
    (None, 'gain mine slope_right neg_mean_absolute_error neg_log_loss recall_at_err corporate scores_of')])
def test_what_names_tell(low, names):
    assert {o:low_is_good(o) for o in names.split()}=={o:low for o in names.split()}
    if low: assert low_is_good('validation error, %') and low_is_good('validation 1 - top_k_accuracy, %') and low_is_good('training loss')

def test_the_best_by_accuracy_with_statistics_of_their_own():
    l,snaps,spy = fitted(Snapshots(every=1), 5, shuffle=False, drop_last=False)
    accs = []
    for m in snaps.members:
        with swapped_state(l.model, m), quiet(l):
            l.update_bn()
            accs.append(l.validate()[1])
    best = sorted(range(5), key=lambda k: -accs[k])[:2]
    calm(snaps.average, l, best=2, metric='accuracy')
    assert len({*accs})>2
    holds(l, weighted(spy, snaps.collected, [k in best for k in range(5)]))

def test_the_best_on_other_data():
    l,snaps = at_places([1.,2.,3.])
    xs = torch.randn(50, 1)
    other = FastaiDataLoader(list(zip(xs, 3*xs)), bs=10)
    calm(snaps.average, l, best=1, dl=other); assert l.model.weight.item()==3
    l.dls.loaders = l.dls.loaders[:1]
    with pytest.raises(ValueError, match='dl='): calm(snaps.average, l, best=1)
    with pytest.raises(ValueError, match='dl='): calm(snaps.choose, l)
    assert l.model.weight.item()==3                                    # what was there stays
    calm(snaps.choose, l, dl=other, ax=False)

# ---- the choice

def test_candidates():
    assert list(candidates(1, (.1,)))==['last weights'] and list(candidates(2, (.1,)))==['last weights','mean of the last 2']
    assert [o['last'] for o in candidates(60, ()).values()]==[1,2,3,5,10,20,30,50,60]
    assert [o['last'] for o in candidates(250, ()).values()]==[1,2,3,5,10,20,30,50,100,200,250]
    assert list(candidates(3, (.1,.2)).values())[-2:]==[dict(half_life=.1),dict(half_life=.2)]

@pytest.mark.parametrize('places,chosen,kw', [
    ([9,8,7,6,5,4,3,2], 'last weights', dict(last=1)),                                   # still on the way
    ([9,9,9,9,1,3,1,3], 'mean of the last 2', dict(last=2)),                             # to and fro at the end
    ([9,9,9,1.5,2.5,2.,3,1], 'mean of the last 2', dict(last=2)),
    ([1,3,1,3,2.6,2,1.3,2.3], None, None)])
def test_the_choice_is_the_lowest_of_all(places, chosen, kw, capsys):
    l,snaps = at_places(places)
    df = calm(snaps.choose, l, ax=False)
    x2,found = torch.cat([o[0] for o in l.dls.valid]).pow(2).mean().item(),l.model.weight.item()
    for name,how in candidates(8, (.05,.1,.2)).items():
        calm(snaps.average, l, **how)
        assert df.loss[name]==pytest.approx((l.model.weight.item()-2)**2*x2, rel=1e-4, abs=1e-10), name
        if df.chosen[name]: assert l.model.weight.item()==found
    assert list(df.columns)==['loss','difference','error','chosen'] and df.chosen.sum()==1
    assert df.loss[df.chosen].item()<=df.loss['last weights']
    if chosen: assert df.index[df.chosen].item()==chosen
    assert not capsys.readouterr().out                                 # under no_logging
    with l.no_bar(): df = snaps.choose(l, ax=False)
    said = capsys.readouterr().out
    assert said.startswith(df.index[df.chosen].item()) and '1000 validation items' in said and 'flatters' in said and np.isfinite(df.attrs['flattery'])

def test_the_chosen_one_is_in_the_model_with_all_its_statistics():
    l,snaps,spy = fitted(n=3, shuffle=False, drop_last=False)
    own = state(l.model)
    df = calm(snaps.choose, l, ax=False)
    how = list(candidates(10, (.05,.1,.2)).values())[[*df.chosen].index(True)]
    found = state(l.model)
    with quiet(l): assert l.validate()[0]==pytest.approx(df.loss[df.chosen].item(), rel=.02)
    snaps.restore(l); assert same(state(l.model), own)
    calm(snaps.average, l, **how)
    for k,v in found.items(): torch.testing.assert_close(l.model.state_dict()[k], v)

def test_scored_with_measured_statistics_in_pieces():
    # 100 validation pictures in two batches: judged in 16 pieces or more; their mean is that of the whole
    l,snaps,spy = fitted(n=3, shuffle=False, drop_last=False)
    df = calm(snaps.choose, l, ax=False)
    for k in 1,10:
        calm(snaps.average, l, last=k)
        # joined training batches give the second layer other statistics: .0003 of the loss
        with quiet(l): assert df.loss.iloc[0 if k==1 else 4]==pytest.approx(l.validate()[0], rel=.02)
    few = calm(snaps.choose, l, n_train=40, n_valid=20, ax=False)
    assert (few.loss!=df.loss).all() and (df.error<.5).all() and (df.error>0).sum()==len(df)-1

def test_a_tie_is_the_last_weights():
    l,snaps = at_places([2.5]*6)
    df = calm(snaps.choose, l, ax=False)
    assert df.chosen.iloc[0] and df.attrs['flattery']==0

def test_the_picture():
    l,snaps = at_places([9,9,9,9,1,3,1,3])
    with quiet(l): snaps.choose(l)
    ax = plt.gca()
    assert [o.get_text() for o in ax.get_xticklabels()]==['last weights','last 2','last 3','last 5','last 8','EMA 0.05','EMA 0.1','EMA 0.2'] and ax.get_ylabel()=='validation loss'
    assert {'chosen','equal weights','exponential'}=={o.get_text() for o in ax.get_legend().get_texts()}
    plt.close()
    n,(_,ax) = len(plt.get_fignums()),plt.subplots()
    with quiet(l): snaps.choose(l, half_lives=(), ax=ax)
    assert len(ax.get_xticklabels())==5 and len(plt.get_fignums())==n+1
    plt.close()
    calm(snaps.choose, l, ax=False); assert len(plt.get_fignums())==n

def test_choosing_leaves_no_trace():
    l,snaps,spy = fitted(learn=learner(net(.3)))
    calm(snaps.average, l, last=2)
    before,rng,others = state(l.model),rng_fingerprint(l),(set(vars(l)),list(map(type, l.cbs)),[m.training for m in l.model.modules()])
    real,count = snaps.store.__class__.__getitem__,[0]
    class Stop(Exception): pass
    for at in 0,3,12:
        count[0] = at
        def get(self, k):
            count[0] -= 1
            if count[0]<0: raise Stop('now')
            return real(self, k)
        snaps.store.__class__.__getitem__ = get
        try:
            with pytest.raises(Stop): calm(snaps.choose, l, ax=False)
        finally: snaps.store.__class__.__getitem__ = real
        assert same(state(l.model), before) and rng_fingerprint(l)==rng and (set(vars(l)),list(map(type, l.cbs)),[m.training for m in l.model.modules()])==others
    calm(snaps.choose, l, ax=False); assert rng_fingerprint(l)==rng
    snaps.restore(l); assert same(weights(l.model), spy.ws[-1])

# ---- what it shares with the ensembles

@pytest.mark.parametrize('where', ['cpu','disk','folder'])
def test_store_save_load_and_predictions(where, tmp_path):
    l,snaps,spy = fitted(Snapshots(every=1, keep_on=tmp_path/'m' if where=='folder' else where), path=tmp_path)
    snaps.save(tmp_path/'copy')
    other,there = learner(s=5),Snapshots().load(tmp_path/'copy')
    assert there.collected==[5,10,15,20] and there.n_averaged==0
    own = weights(other.model)
    calm(there.average, other, last=2); holds(other, spy.mean([15,20]))
    assert len(there._average.layers)==2                            # measured: those of the other learner
    there.restore(other); assert same(weights(other.model), own)
    with quiet(l):
        preds,_ = snaps.get_preds(l)
        each = []
        for m in snaps.members:
            with swapped_state(l.model, m): each.append(l.get_preds()[0])
    torch.testing.assert_close(preds, torch.stack(each).mean(0), atol=1e-6, rtol=1e-6)
    calm(there.choose, other, ax=False)

class Boom(Callback):
    order,run_valid = 2000,False
    def after_epoch(self):
        if self.learn.epoch==1: raise KeyboardInterrupt
def test_goes_on_from_its_own_weights(tmp_path):
    want = fitted(Snapshots(every=1))[1].members
    def go(look):
        l,snaps = learner(),Snapshots(every=1, keep_on=tmp_path/str(look))
        with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[snaps, Boom()])
        assert snaps.collected==[5,10]
        if look: calm(snaps.average, l)                                  # somebody looks at it meanwhile
        fit(l, 4, cbs=snaps, start_epoch=2)
        assert snaps.collected==[5,10,15,20] and snaps.n_averaged==0 and all(same(p, q) for p,q in zip(snaps.members[:2], want))
        return snaps.members
    assert all(map(same, go(False), go(True)))

def test_a_new_fit_begins_anew():
    l,snaps,spy = fitted()
    calm(snaps.average, l)
    mean = weights(l.model)
    spy = Spy(); fit(l, 2, cbs=[snaps, spy])                     # from the average
    assert snaps.collected==list(range(1,11)) and snaps.n_averaged==0
    calm(snaps.average, l, last=2); holds(l, spy.mean([9,10]))

def test_members_of_the_next_fit_have_the_statistics_that_were_asked_for():
    l,snaps,spy = fitted(n=1)
    calm(snaps.average, l)
    fit(l, 1, cbs=snaps)
    assert torch.equal(snaps.members[-1]['1.running_mean'], l.model[1].running_mean)      # running ones

class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain_net()
    def forward(self, b): return self.net(b['x'])

def test_batches_that_cannot_be_split():
    def loader(n, bs): return FastaiDataLoader([({'x':x},y) for x,y in zip(X[:n], Y[:n])], bs=bs)
    l,snaps,spy = fitted(learn=learner(Dicts(), data=DataLoaders(loader(200, 40), loader(100, 100))))
    table = calm(snaps.choose, l, ax=False)                # in one batch: the lowest loss, and no word on luck
    assert table.loss.iloc[table.chosen.to_numpy().argmax()]==table.loss.min() and np.isnan(table.attrs['flattery'])
    calm(snaps.choose, l, dl=loader(100, 10), ax=False)

def test_copies_and_pickles():
    l,snaps,spy = fitted()
    calm(snaps.average, l)
    for o in deepcopy(snaps),pickle.loads(pickle.dumps(snaps)): assert o.n_members==0 and o.n_averaged==0 and o.every is None
    assert repr(snaps)=='Snapshots(n_members=10)'

def test_trained_on_since():
    l,snaps,spy = fitted()
    calm(snaps.average, l)
    fit(l, 1)
    now = weights(l.model)
    with pytest.raises(RuntimeError, match='changed'): snaps.restore(l)
    calm(snaps.average, l, last=2); holds(l, spy.mean(snaps.collected[-2:]))
    snaps.restore(l); assert same(weights(l.model), now)          # what the average replaced

# ---- refused

@pytest.mark.parametrize('kw,exc,match', [
    (dict(every=0), ValueError, 'every=0'), (dict(every='x'), TypeError, 'every'), (dict(start=1.5), ValueError, 'start=1.5'), (dict(start='a'), TypeError, 'start'), (dict(keep=0), ValueError, 'keep=0'),
    (dict(keep=2.5), TypeError, 'keep=2.5'), (dict(keep_on='gpu'), ValueError, "keep_on='gpu'"), (dict(bn_batches=-1), ValueError, 'bn_batches')])
def test_arguments_are_checked_at_once(kw, exc, match):
    with pytest.raises(exc, match=match): Snapshots(**kw)

def test_averages_that_cannot_be():
    l,snaps,spy = fitted()
    before = state(l.model)
    for kw,exc,match in [(dict(last=11), ValueError, 'last=11: there are 10'), (dict(best=11), ValueError, 'best=11: there are 10'), (dict(last=0), ValueError, 'last=0'), (dict(last=2.5), TypeError, 'last=2.5'),
                         (dict(last=2, best=3), ValueError, 'give one of'), (dict(weights=[1,2]), ValueError, 'give 10 numbers'), (dict(weights=[]), ValueError, 'give 10 numbers'), (dict(weights=[0]*10), ValueError, 'not all of them 0'),
                         (dict(weights=[-1]+[1]*9), ValueError, 'weights=-1'), (dict(weights=['a']*10), TypeError, 'weights'), (dict(half_life=0), ValueError, 'half_life=0'), (dict(half_life='x'), TypeError, 'half_life'),
                         (dict(bn_batches=0), ValueError, 'bn_batches=0'), (dict(last=2, metric='accuracy'), ValueError, 'beside best only'), (dict(best=2, metric='f2'), ValueError, "metric='f2'")]:
        with pytest.raises(exc, match=match): calm(snaps.average, l, **kw)
        assert same(state(l.model), before), kw
    with pytest.raises(TypeError, match='foo'): calm(snaps.average, l, best=2, foo=3)
    with pytest.raises(ValueError, match='half_lives=0'): calm(snaps.choose, l, half_lives=[0])
    with pytest.raises(TypeError, match='needs the learner'): snaps.average(l.model)
    with pytest.raises(RuntimeError, match='snaps.choose'): snaps.apply(l)
    with pytest.raises(RuntimeError, match='no members yet'): Snapshots().average(l)
    with pytest.raises(RuntimeError, match='pass this Snapshots'): Snapshots().apply(l)

def test_not_in_the_middle_of_a_fit():
    class Now(Callback):
        def after_epoch(self):
            for f in (self.snapshots.average, self.snapshots.choose):
                with pytest.raises(RuntimeError, match='the fit is going on'): f(self.learn)
    fitted(cbs=[Now()])
