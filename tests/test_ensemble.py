"Snapshot ensembles and FGE: the papers' schedules, members, predictions, and company"
import gc, math, pickle, signal, sys
from copy import deepcopy
from fractions import Fraction
from types import SimpleNamespace

import pytest, torch
import torch.nn.functional as F
from common import *
import pandas as pd
from fastcore.test import test_close
from fastai.metrics import *
from hypothesis import given, strategies as st
from test_applications import tabular, text, torch_loaders, vision
from fastswa import ensemble, members, voting
from fastswa.batchnorm import update_bn
from fastswa.callback import SWA
from fastswa.ensemble import FGE, Ensemble, SnapshotEnsemble, fge_cycles, snapshot_cycles, snapshot_lr
from fastswa.voting import activation, inverse

# The formulas, written down once more from the papers

def snapshot_alpha(t, T, M, a0): return a0/2*(math.cos(math.pi*((t-1)%math.ceil(T/M))/math.ceil(T/M))+1)
def fge_alpha(i, c, a1, a2):
    t = ((i-1)%c+1)/c
    return (1-2*t)*a1+2*t*a2 if t<=1/2 else (2-2*t)*a2+(2*t-1)*a1

def fitted(cb, epochs=4, method='fit', learn=None, cbs=(), **kw):
    learn,spy = learner(**kw) if learn is None else learn,Spy()
    fit(learn, epochs, method=method, cbs=[*L(cb), spy, *cbs])
    return learn,spy

def alike(a, b): return a.keys()==b.keys() and all(torch.equal(a[k],b[k]) for k in a)

def by_hand(learn, ens, x, last=None, act=lambda o: o.softmax(1), model=None):
    "Mean of the activations over the members, one copy of the model for each"
    res = []
    for state in ens.members[-(last or 99):]:
        m = deepcopy(learn.model if model is None else model)
        m.load_state_dict(state)
        with torch.no_grad(): res.append(act(m.eval()(x).double()))
    return torch.stack(res).mean(0)

# ---- the schedules

@pytest.mark.parametrize('n,M', [(4,5), (4,4), (3,4), (2,3), (5,2), (1,1), (4,19), (3,15)])
def test_snapshot_schedule(n, M):
    snap,T = SnapshotEnsemble(M, lr_max=.07),5*n
    learn,spy = fitted(snap, n)
    np.testing.assert_allclose([o[0] for o in spy.lrs], [snapshot_alpha(t, T, M, .07) for t in range(1,T+1)], rtol=1e-12)
    C = math.ceil(T/M)
    assert snap.collected==[t for t in range(1,T+1) if t%C==0 or t==T]          # before each restart, and at the end

@pytest.mark.parametrize('kw', [dict(), dict(start=.5, cycle_len=.8), dict(start=1, cycle_len=2), dict(start=.3, cycle_len=.5), dict(start=0, cycle_len=1.3, lr_max=.2, lr_min=.01), dict(start=3)])
@pytest.mark.parametrize('n', [5,7])
def test_fge_schedule(kw, n):
    fge,T = FGE(**kw),5*n
    learn,spy = fitted(fge, n)
    cyc = fge_cycles(n, 5, kw.get('start',.8), kw.get('cycle_len'))
    a1 = kw.get('lr_max', .05); a2 = kw.get('lr_min', a1/100)
    c = cyc.ends[1]-cyc.ends[0] if len(cyc.ends)>1 else 2*(cyc.ends[0]-cyc.begin)
    assert c%2==0
    want = [.1]*cyc.begin+[fge_alpha(i, c, a1, a2) for i in range(1, T-cyc.begin+1)]
    np.testing.assert_allclose([o[0] for o in spy.lrs], want, rtol=1e-9)
    assert fge.collected==[cyc.begin+i for i in range(1, T-cyc.begin+1) if (i-1)%c+1==c//2] and fge.collected[-1]==T
    first = kw.get('start',.8)
    first = first*5 if isinstance(first, int) else int(first*T+1e-9)
    assert first<=cyc.begin<first+c

@given(st.integers(1,9), st.integers(1,40), st.one_of(st.floats(0,.99), st.integers(0,8)), st.one_of(st.none(), st.floats(.01,5)))
def test_fge_cycles_in_general(n_epoch, n_iter, start, cycle_len):
    total = n_epoch*n_iter
    first = start*n_iter if isinstance(start, int) else int(start*total+1e-9)
    try: cyc = fge_cycles(n_epoch, n_iter, start, cycle_len)
    except ValueError as e:
        assert 'too long' in str(e) and cycle_len*n_iter/2>total-first-.51
        return
    if first>=total: assert cyc.ends==(); return
    half = cyc.ends[0]-cyc.begin
    assert cyc.ends[-1]==total and half>=1 and all(b-a==2*half for a,b in zip(cyc.ends, cyc.ends[1:]))
    assert first<=cyc.begin<first+2*half
    if cycle_len is None:
        assert half<=max(1, 2*n_iter) and (len(cyc.ends)>=5 or total-first<9)
    else: assert abs(half-cycle_len*n_iter/2)<=.5 or half==1

@given(st.integers(1,9), st.integers(1,40), st.integers(1,50))
def test_snapshot_cycles_in_general(n_epoch, n_iter, M):
    T,ends = n_epoch*n_iter,snapshot_cycles(n_epoch, n_iter, M).ends
    assert ends[-1]==T and len(ends)<=M and all(e%math.ceil(T/M)==0 for e in ends[:-1]) and sorted(set(ends))==list(ends)

def test_cycles_that_do_not_fit_are_announced():
    with pytest.warns(UserWarning, match='7 cycles of whole iterations do not fit into 10: there will be 5'): fitted(SnapshotEnsemble(7), 2)
    with pytest.raises(ValueError, match='cycle_len=9 epochs is too long'): fitted(FGE(cycle_len=9), 4)

@pytest.mark.parametrize('make', [lambda: SnapshotEnsemble(2), lambda: FGE(start=.5, cycle_len=1)])
def test_proportions_of_groups(make):
    learn,spy = fitted(make(), 4, splitter=two_groups, lr=slice(.01,.1))
    lrs = np.array(spy.lrs)
    np.testing.assert_allclose(lrs[:,0]/lrs[:,1], .1, rtol=1e-6)

def test_lists_for_groups():
    learn,spy = fitted(FGE(start=.5, cycle_len=1, lr_max=[.01,.02], lr_min=slice(1e-4,1e-3)), 4, splitter=two_groups)

    c = fge_cycles(4, 5, .5, 1)
    np.testing.assert_allclose(spy.lrs[c.ends[0]-1], [1e-4,1e-3], rtol=1e-6)
    for cb in FGE(lr_max=[.1]*3),FGE(lr_min=[.1]*3),SnapshotEnsemble(lr_max=[.1]*3):
        with pytest.raises(ValueError, match='2 parameter groups'): fitted(cb, 4, splitter=two_groups)

def test_beside_a_schedule():
    learn,spy = fitted(SnapshotEnsemble(2), 4, method='fit_one_cycle')
    assert spy.lrs[0][0]==pytest.approx(.1, rel=1e-3) and spy.lrs[10]==spy.lrs[0]          # the highest of the schedule, not its warm-up
    class Moms(Callback):
        order = 1000
        def before_fit(self): self.moms = []
        def after_batch(self):
            if self.training: self.moms.append(self.opt.hypers[-1]['mom'])
    moms = Moms()
    fitted(SnapshotEnsemble(2), 4, method='fit_one_cycle', cbs=[moms])
    assert len(set(moms.moms))==1
    fge = FGE(start=.5)
    fitted(fge, 4, method='fit_one_cycle', cbs=[moms])
    assert len(set(moms.moms[:10]))>5 and len(set(moms.moms[fge.fit_state.cycles.begin:]))==1

def test_nothing_else_changes():
    snap = SnapshotEnsemble(3)
    learn,spy = fitted(snap, 4, model=net(.3))
    class Hand(Callback):
        order,run_valid,k = 61,False,0
        def before_batch(self): self.learn.opt.set_hyper('lr', snapshot_alpha(self.k+1, 20, 3, .1)); self.k += 1
    ref,spy2 = fitted(Hand(), 4, model=net(.3))
    assert all(same(a,b) for a,b in zip(spy.ws,spy2.ws)) and same(state(learn.model), state(ref.model)) and rng_fingerprint(learn)==rng_fingerprint(ref)

def test_reduce_lr_on_plateau_is_not_fought_silently():
    with pytest.warns(UserWarning, match='FGE sets the learning rate from iteration'): fitted(FGE(start=.5), 4, cbs=[ReduceLROnPlateau()])

# ---- members

@pytest.mark.parametrize('make', [lambda **kw: SnapshotEnsemble(3, **kw), lambda **kw: FGE(start=.4, cycle_len=.8, **kw)])
@pytest.mark.parametrize('keep_on', ['cpu','disk','path'])
def test_members_are_the_weights_of_their_moment(make, keep_on, tmp_path):
    ens = make(keep_on=tmp_path/'m' if keep_on=='path' else keep_on)
    class Keep(Callback):
        order = 2000
        def before_fit(self): self.states = []
        def after_batch(self):
            if self.training: self.states.append(state(self.model))
    keep = Keep()
    learn,_ = fitted(ens, 4, cbs=[keep], path=tmp_path)
    assert ens.n_members==len(ens.collected)>=3
    for it,member in zip(ens.collected, ens.members): assert alike(member, keep.states[it-1])
    if keep_on=='path': assert sorted(o.name for o in (tmp_path/'m').iterdir())==[f'member_{o:08d}.pt' for o in ens.collected]
    if keep_on=='disk':
        folder, = (tmp_path/'models').iterdir()
        assert len(list(folder.iterdir()))==ens.n_members and not any(isinstance(o, dict) for o in ens.store.kept)
        del ens; gc.collect()
        fit(learn, 1)                                      # the learner may still know it as the last callback
        gc.collect()
        assert not folder.exists()

def test_last(tmp_path):
    for keep_on in 'cpu',tmp_path/'m':
        a,b = SnapshotEnsemble(5),SnapshotEnsemble(5, last=2, keep_on=keep_on)
        learn,_ = fitted(a, 5); fitted(b, 5)
        assert a.n_members==5 and b.n_members==2 and b.collected==a.collected and all(alike(x,y) for x,y in zip(a.members[-2:], b.members))
        assert torch.equal(a.get_preds(learn, last=2)[0], b.get_preds(learn)[0]) and not torch.equal(a.get_preds(learn)[0], b.get_preds(learn)[0])
        test_close(a.get_preds(learn, last=3)[0], by_hand(learn, a, X[200:300], last=3).float(), 1e-6)
    assert len(list((tmp_path/'m').iterdir()))==2
    with pytest.raises(ValueError, match='last=6: there are 5'): a.validate(learn, last=6)

def test_fits_begin_anew():
    ens,learn = SnapshotEnsemble(2),learner()
    fitted(ens, 2, learn=learn); old = ens.members
    fitted(ens, 3, learn=learn)
    assert ens.n_members==2 and ens.collected==[8,15] and not alike(old[0],ens.members[0])

def test_statistics_measured_for_each_member(tmp_path):
    for keep_on in 'cpu',tmp_path/'m':
        ens,ref = FGE(start=.4, cycle_len=1, bn_batches=None, keep_on=keep_on),FGE(start=.4, cycle_len=1)
        learn,_ = fitted(ens, 4, drop_last=False, shuffle=False, n=190)
        fitted(ref, 4, drop_last=False, shuffle=False, n=190)
        for a,b in zip(ens.members, ref.members):
            m = deepcopy(learn.model); m.load_state_dict(b)
            update_bn(m.train(), learn.dls.train)
            for k,v in m.state_dict().items():
                if 'running' in k: torch.testing.assert_close(a[k], v); assert not torch.allclose(a[k], b[k])
                else: assert torch.equal(a[k], b[k])
    few = FGE(start=.4, cycle_len=1, bn_batches=1)
    fitted(few, 4, drop_last=False, shuffle=False, n=190)
    assert not torch.allclose(few.members[0]['1.running_mean'], ens.members[0]['1.running_mean'])
    fitted(FGE(bn_batches=None), 2, model=plain_net())                    # no BatchNorm, nothing to do

def test_diverged_members_are_left_out():
    class Boom(Callback):
        def after_batch(self):
            if self.training and self.learn.train_iter==10: self.p = next(self.learn.model.parameters()); self.was = self.p.detach().clone(); self.p.data.fill_(math.nan)
        def before_train(self):
            if self.learn.epoch==2: self.p.data.copy_(self.was)
    ens = SnapshotEnsemble(4)
    with pytest.warns(UserWarning, match='not finite after 10'): fitted(ens, 4, cbs=[Boom()])
    assert ens.collected==[5,15,20]

# ---- predictions

def test_predictions_are_the_mean_softmax():
    ens = SnapshotEnsemble(4)
    learn,_ = fitted(ens, 4)
    before = state(learn.model)
    hand = by_hand(learn, ens, X[200:300])
    with quiet(learn):
        streams = []
        for o in learn,ens:                         # all random streams go on as after one ordinary call
            seed(5); a = [learn][:o is ens]
            o.validate(*a); o.get_preds(*a, dl=learn.dls.valid); streams.append(rng_fingerprint(learn))
        assert streams[0]==streams[1]
        learn.model.train()                             # as a fit may have left it
        preds,targs = ens.get_preds(learn)
        torch.testing.assert_close(preds, hand.float(), atol=1e-6, rtol=1e-5)
        assert torch.equal(targs, Y[200:300])
        loss,acc = ens.validate(learn)
    assert loss==pytest.approx(F.nll_loss(hand.log(), Y[200:300]).item(), rel=1e-5)
    assert acc==pytest.approx((hand.argmax(1)==Y[200:300]).float().mean().item())
    assert same(before, state(learn.model))
    assert (hand-by_hand(learn, ens, X[200:300], last=1)).abs().max()>.01               # the members differ, or nothing was tested

def test_one_member_is_the_learner_itself():
    ens = SnapshotEnsemble(1)
    learn,_ = fitted(ens, 2)
    with quiet(learn):
        np.testing.assert_allclose(ens.validate(learn), learn.validate(), rtol=1e-5)
        np.testing.assert_allclose(ens.validate(learn, 0), learn.validate(0), rtol=.02)         # the training loader draws an order of its own each time
        for a,b in zip(ens.get_preds(learn), learn.get_preds()): torch.testing.assert_close(a, b)

def test_more_of_what_get_preds_returns():
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    hand = by_hand(learn, ens, X[200:300])
    with quiet(learn):
        inp,preds,targs,dec,loss = ens.get_preds(learn, with_input=True, with_decoded=True, with_loss=True)
        assert torch.equal(inp, X[200:300]) and torch.equal(dec, hand.argmax(1))
        torch.testing.assert_close(preds, hand.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(loss, F.nll_loss(hand.log(), targs, reduction='none').float(), atol=1e-4, rtol=1e-4)
        raw = ens.get_preds(learn, act=noop)[0]
    torch.testing.assert_close(raw, by_hand(learn, ens, X[200:300], act=noop).float(), atol=1e-5, rtol=1e-5)

def test_all_members_see_the_same_order():
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    hand = by_hand(learn, ens, X[:200])
    for dl in learn.dls.train,FastaiDataLoader(list(zip(X[:200],Y[:200])), bs=30, shuffle=True, drop_last=False),torch.utils.data.DataLoader(list(zip(X[:200],Y[:200])), 30, shuffle=True):
        with quiet(learn): preds,targs = ens.get_preds(learn, dl=dl)
        if isinstance(dl, torch.utils.data.DataLoader):             # in the order it was drawn in
            assert not torch.equal(targs, Y[:200])
            assert (preds.argmax(1)==targs).float().mean()==pytest.approx((hand.argmax(1)==Y[:200]).float().mean().item())
            torch.testing.assert_close(preds.sort(0)[0], hand.float().sort(0)[0], atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(targs, Y[:200])
            torch.testing.assert_close(preds, hand.float(), atol=1e-5, rtol=1e-4)
        with quiet(learn): loss,acc = ens.validate(learn, dl=dl)
        if isinstance(dl, torch.utils.data.DataLoader): assert loss==pytest.approx(F.nll_loss(hand.log(), Y[:200]).item(), rel=1e-4)
    with quiet(learn): loss,acc = ens.validate(learn, 0)                 # shuffled, 5 whole batches of 40
    assert loss==pytest.approx(F.nll_loss(hand.log(), Y[:200]).item(), rel=1e-4)

multi = (torch.arange(10)[None]<=Y[:,None]).float()                # several labels for each picture

class TwoHeads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body,self.a,self.b,self.kind = nn.Sequential(nn.Flatten(), nn.Linear(64,8), nn.BatchNorm1d(8), nn.ReLU()),nn.Linear(8,10),nn.Linear(8,1),kind
    def forward(self, x):
        x = self.body(x)
        return dict(a=self.a(x), b=self.b(x)) if self.kind is dict else self.kind((self.a(x), self.b(x)))

class TwoLoss:
    def __call__(self, o, y):
        a,b = o.values() if isinstance(o, dict) else o
        return F.cross_entropy(a, y)+F.mse_loss(b[:,0], y.float()/10)
    def activation(self, o):
        if isinstance(o, dict): return dict(a=o['a'].softmax(1), b=o['b'])
        return type(o)((o[0].softmax(1), o[1]))

@pytest.mark.parametrize('kind', [tuple,list,dict])
def test_several_outputs(kind):
    seed()
    ens = SnapshotEnsemble(3)
    learn = Learner(dls(), TwoHeads(kind), loss_func=TwoLoss(), opt_func=sgd, lr=.05, metrics=[])
    fit(learn, 3, cbs=ens)
    pick = lambda o: list(o.values()) if kind is dict else o
    for i,act in enumerate((lambda o: pick(o)[0].double().softmax(1), lambda o: pick(o)[1].double())):
        res = []
        for s in ens.members:
            m = deepcopy(learn.model); m.load_state_dict(s)
            with torch.no_grad(): res.append(act(m.eval()(X[200:300])))
        if i==0: a = torch.stack(res).mean(0)
        else: b = torch.stack(res).mean(0)
    with quiet(learn): loss, = ens.validate(learn)
    assert loss==pytest.approx((F.nll_loss(a.log(), Y[200:300])+F.mse_loss(b[:,0], Y[200:300]/10)).item(), rel=1e-4)
    if kind is not dict:                   # fastai itself cannot gather dicts
        with quiet(learn): (pa,pb),_ = ens.get_preds(learn)
        torch.testing.assert_close(pa, a.float(), atol=1e-5, rtol=1e-4); torch.testing.assert_close(pb, b.float(), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('loss,act,targ', [
    (nn.CrossEntropyLoss(), lambda o: o.softmax(1), Y), (F.cross_entropy, lambda o: o.softmax(1), Y), (LabelSmoothingCrossEntropy(), lambda o: o.softmax(1), Y),
    (BCEWithLogitsLossFlat(), torch.sigmoid, multi), (nn.BCEWithLogitsLoss(), torch.sigmoid, multi), (F.binary_cross_entropy_with_logits, torch.sigmoid, multi),
    (MSELossFlat(), lambda o: o, multi), (nn.MSELoss(), lambda o: o, multi), (F.mse_loss, lambda o: o, multi), (nn.NLLLoss(), torch.exp, Y)], ids=lambda o: getattr(o,'__name__',type(o).__name__))
def test_any_activation(loss, act, targ):
    seed()
    model = net() if not isinstance(loss, nn.NLLLoss) else nn.Sequential(net(), nn.LogSoftmax(1))
    data = DataLoaders(FastaiDataLoader(list(zip(X[:200],targ[:200])), bs=40, shuffle=True), FastaiDataLoader(list(zip(X[200:300],targ[200:300])), bs=64))
    learn = Learner(data, model, loss_func=loss, opt_func=sgd, lr=.02)
    ens = SnapshotEnsemble(3)
    fit(learn, 3, cbs=ens)
    hand = by_hand(learn, ens, X[200:300], act=act)
    inv = {torch.sigmoid: lambda a: (a/(1-a)).log()}.get(act, (lambda a: a.log()) if targ is Y else noop)
    with quiet(learn):
        torch.testing.assert_close(ens.get_preds(learn)[0], hand.float(), atol=1e-6, rtol=1e-4)
        assert ens.validate(learn)[0]==pytest.approx(loss(inv(hand), targ[200:300].double() if targ is not Y else Y[200:300]).item(), rel=1e-4)

def test_unknown_activation():
    class Odd:
        def __call__(self, o, y): return F.cross_entropy(o, y)
        def activation(self, o): return o.tanh()*3
    seed()
    ens,learn = SnapshotEnsemble(2),Learner(dls(), net(), loss_func=Odd(), opt_func=sgd, lr=.02)
    fit(learn, 2, cbs=ens)
    hand = by_hand(learn, ens, X[200:300], act=lambda o: o.tanh()*3)
    with quiet(learn):
        torch.testing.assert_close(ens.get_preds(learn)[0], hand.float(), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match='give inv='): ens.validate(learn)
        assert ens.validate(learn, inv=lambda a: (a/3).atanh())[0]==pytest.approx(F.cross_entropy((hand/3).atanh(), Y[200:300]).item(), rel=1e-4)
        assert ens.validate(learn, act=lambda o: o.softmax(1))[0]==pytest.approx(F.nll_loss(by_hand(learn, ens, X[200:300]).log(), Y[200:300]).item(), rel=1e-4)

def test_confident_members_lose_no_digits():
    class Loud(nn.Module):
        def forward(self, x): return 120*x
    seed()
    data = DataLoaders(FastaiDataLoader(list(zip(X[:200],multi[:200])), bs=40, shuffle=True), FastaiDataLoader(list(zip(X[200:300],1-multi[200:300])), bs=64))
    learn,ens = Learner(data, nn.Sequential(net(), Loud()), loss_func=BCEWithLogitsLossFlat(), opt_func=sgd, lr=1e-9),SnapshotEnsemble(1)
    fit(learn, 3, cbs=ens)
    with quiet(learn):
        loss, = learn.validate()
        assert loss>5 and learn.get_preds(act=noop)[0].abs().max()>20                    # wrong and very sure
        assert ens.validate(learn)[0]==pytest.approx(loss, rel=1e-3)
    z = torch.tensor([[60.,0,-60],[300.,0,0]])
    for act,loss in ((lambda o: o.softmax(1)), lambda o: F.cross_entropy(o, torch.tensor([2,1]))),(torch.sigmoid, lambda o: F.binary_cross_entropy_with_logits(o[:,:1], torch.zeros(2,1))):
        a = act(z.double()[:,:2] if act is torch.sigmoid else z.double())
        out = inverse(act, act(torch.randn(5,3).double()))(a)
        assert torch.isfinite(out).all() and 30<loss(out)<700

def test_metrics_are_the_learners_own():
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3, metrics=[accuracy, F1Score(average='macro'), Perplexity(), top_k_accuracy])
    with quiet(learn): loss,acc,f1,perp,top = ens.validate(learn)
    hand = by_hand(learn, ens, X[200:300])
    from sklearn.metrics import f1_score
    assert f1==pytest.approx(f1_score(Y[200:300], hand.argmax(1), average='macro')) and perp==pytest.approx(math.exp(loss), rel=1e-5)
    assert top==pytest.approx((hand.topk(5)[1]==Y[200:300,None]).any(1).float().mean().item())

@pytest.mark.parametrize('make', [vision, tabular, text, torch_loaders])
def test_on_the_learners_people_have(make, tmp_path):
    seed()
    learn,item = make(tmp_path)
    ens = SnapshotEnsemble(2, keep_on='disk')
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=ens)
        each = []
        own = state(learn.model)
        for s in ens.members:
            learn.model.load_state_dict(s)
            each.append((learn.get_preds(dl=learn.dls.valid)[0], None if item is None else learn.predict(item)[2]))
        learn.model.load_state_dict(own)
        torch.testing.assert_close(ens.get_preds(learn)[0], (each[0][0]+each[1][0])/2, atol=1e-5, rtol=1e-4)
        assert (each[0][0]-each[1][0]).abs().max()>1e-4
        loss,acc = ens.validate(learn)
        assert 0<=acc<=1 and math.isfinite(loss)
        if item is not None:
            dec,idx,probs = ens.predict(learn, item)
            torch.testing.assert_close(probs, (each[0][1]+each[1][1])/2, atol=1e-5, rtol=1e-4)
            assert idx==probs.argmax() and (make is tabular or len(ens.predict(learn, item, with_input=True))==4)
            assert type(dec)==type(learn.predict(item)[0]) and 'get_preds' not in vars(learn)
            torch.testing.assert_close(ens.predict(learn, item, last=1)[2], each[1][1], atol=1e-5, rtol=1e-4)

def test_recurrent_state_of_each_member(tmp_path):
    "A language model carries its hidden state from batch to batch: each member its own"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_lm_config, language_model_learner
    words = 'the film was great good awful bad boring a fine plot with poor acting and more'.split()
    seed()
    df = pd.DataFrame(dict(text=[' '.join(np.random.choice(words, 30)) for _ in range(60)]))
    data = TextDataLoaders.from_df(df, path=tmp_path, text_col='text', is_lm=True, valid_pct=.3, bs=4, seq_len=8, seed=1)
    learn = language_model_learner(data, AWD_LSTM, config={**awd_lstm_lm_config, 'emb_sz':12, 'n_hid':16, 'n_layers':2}, pretrained=False, metrics=accuracy, path=tmp_path)
    ens = SnapshotEnsemble(2)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-1, cbs=ens)
        own,each = state(learn.model),[]
        for s in ens.members:
            learn.model.load_state_dict(s)
            each.append(learn.get_preds(dl=learn.dls.valid, reorder=False)[0])
        learn.model.load_state_dict(own)
        torch.testing.assert_close(ens.get_preds(learn, dl=learn.dls.valid, reorder=False)[0], (each[0]+each[1])/2, atol=1e-5, rtol=1e-4)
        assert ens.validate(learn)[0]>0

def test_autocast_is_that_of_the_learner():
    ens = SnapshotEnsemble(2)
    learn,_ = fitted(ens, 2)
    class Auto(Callback):
        order,seen = 10,0
        def before_batch(self): self.ctx = torch.autocast('cpu', torch.bfloat16); self.ctx.__enter__()
        def after_pred(self): Auto.seen += self.pred.dtype==torch.bfloat16; self.learn.pred = self.pred.float()
        def after_loss(self): self.ctx.__exit__(None,None,None)
    learn.add_cb(Auto())
    with quiet(learn): a = ens.get_preds(learn)[0]
    assert Auto.seen==2*2                                    # two batches, two members
    torch.testing.assert_close(a, by_hand(learn, ens, X[200:300]).float(), atol=.03, rtol=.1)

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('at', [1,3,5])
def test_interrupted_while_voting(exc, at):
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    class Stop(Callback):
        n = 0
        def before_batch(self):
            self.n += 1
            if self.n==at: raise exc()
    before,rng,stop = state(learn.model),rng_fingerprint(learn),Stop()
    learn.add_cb(stop)
    try:
        with quiet(learn): ens.validate(learn)
    except (ValueError,KeyboardInterrupt,IndexError): assert exc is not CancelFitException
    except RuntimeError as e: assert exc is CancelFitException and 'ended one of the passes' in str(e)
    else: assert exc is CancelFitException and at==5                          # in the last pass: as `learn.validate` has it
    learn.remove_cb(stop)
    assert same(before, state(learn.model)) and not [cb for cb in learn.cbs if isinstance(cb, voting.Vote)]
    with quiet(learn): torch.testing.assert_close(ens.get_preds(learn)[0], by_hand(learn, ens, X[200:300]).float(), atol=1e-6, rtol=1e-4)

def test_members_keep_their_values():
    "Voting lends them by pointer: a model that writes into its buffers must not write into a member"
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.net = net(); self.register_buffer('seen', torch.zeros(()))
        def forward(self, x): self.seen += 1; return self.net(x)
    ens = SnapshotEnsemble(2)
    learn,_ = fitted(ens, 2, model=Counts())
    learn.model.seen += 100                    # not those of any member
    was,seen = [{k:v.clone() for k,v in o.items()} for o in ens.members],learn.model.seen.clone()
    with quiet(learn): ens.validate(learn); ens.get_preds(learn)
    assert all(alike(a,b) for a,b in zip(was, ens.members)) and learn.model.seen==seen

# ---- company

def test_one_walk_for_both():
    swa,fge = SWA(),FGE()
    learn,spy = fitted(None, 6, cbs=[swa,fge])
    assert swa.collected==fge.collected and swa.n_averaged==fge.n_members==8
    for k,p in learn.model.named_parameters(): torch.testing.assert_close(p.detach().double(), torch.stack([o[k].double() for o in fge.members]).mean(0), atol=1e-6, rtol=1e-6)
    ref,alone = learner(),SWA()
    fit(ref, 6, cbs=alone)
    assert same(state(ref.model), state(learn.model))                      # FGE has changed nothing
    swa.restore(learn)
    assert alike(fge.members[-1], state(learn.model))
    assert fge.plot_sched().get_lines()[1].get_xdata().tolist()==swa.plot_sched().get_lines()[1].get_xdata().tolist()

def test_swa_saw_tooth_and_fit_swa_are_followed():
    swa,fge = SWA(start=.5, swa_lr=.01, swa_lr_max=.1, cycle_len=1),FGE()
    fitted(fge, 6, cbs=[swa])
    assert swa.collected==fge.collected==[20,25,30]
    learn,fge = learner(),FGE()
    with quiet(learn): swa = learn.fit_swa(4, cbs=fge)
    assert swa.collected==fge.collected and fge.n_members==5

@pytest.mark.parametrize('make,want', [(lambda: FGE(start=.5, cycle_len=1.2), [18,24,30]), (lambda: FGE(), [26,28,30]), (lambda: SnapshotEnsemble(3), [30])])
def test_swa_follows_an_ensemble(make, want, recwarn):
    swa,ens = SWA(swa_lr=False, start=.7),make()
    learn,spy = fitted(ens, 6, cbs=[swa])
    assert swa.collected==[o for o in ens.collected if o>21] and (ens.collected==want or isinstance(ens, SnapshotEnsemble) and ens.collected==[10,20,30])
    for k,p in learn.model.named_parameters():
        torch.testing.assert_close(p.detach().double(), torch.stack([o[k].double() for o in ens.members[-swa.n_averaged:]]).mean(0), atol=1e-6, rtol=1e-6)
    assert not [o for o in recwarn if 'anneal' in str(o.message)]
    swa = SWA(swa_lr=False, start=.5, cycle_len=1)           # its own points, on that walk
    fitted(make(), 6, cbs=[swa])
    assert swa.collected==[20,25,30]

@pytest.mark.parametrize('cbs', [lambda: [SWA(), FGE(cycle_len=1)], lambda: [FGE(lr_max=.1), SWA(swa_lr=.1)], lambda: [SWA(), SnapshotEnsemble()], lambda: [SnapshotEnsemble(), FGE()],
                                 lambda: [FGE(), FGE()], lambda: [SnapshotEnsemble(), SnapshotEnsemble()]])
def test_schedules_that_disagree(cbs):
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match='would both set the learning rate'): fit(learn, 4, cbs=cbs())
    assert same(before, state(learn.model)) and not [cb for cb in learn.cbs if isinstance(cb, (SWA,Ensemble))]

# ---- what is not a fit, and fits of other kinds

def test_what_is_not_a_fit_is_not_touched(tmp_path):
    ens = SnapshotEnsemble(2)
    learn = learner(cbs=ens, path=tmp_path)
    with quiet(learn):
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=6, show_plot=False)
        assert ens.n_members==0
        fit(learn, 2)
        assert not ens.in_fit and ens._coming is None
        was = ens.members
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=6, show_plot=False); ens.validate(learn); ens.get_preds(learn)
    assert ens.n_members==2 and all(a['0.weight'] is b['0.weight'] for a,b in zip(was, ens.members))

def test_fine_tune_second_fit_only():
    ens,had = SnapshotEnsemble(2),[]
    class Look(Callback):
        order = 2000
        def before_validate(self): had.append(ens.n_members)
    learn,spy = fitted(None, 2, method='fine_tune', cbs=[ens,Look()], splitter=two_groups)
    assert ens.collected==[5,10] and had==[0,1,2]                # after one frozen epoch, and after each of the two others

def test_never_started_and_nothing_collected():
    with pytest.warns(UserWarning, match=r'FGE\(start=9\) will never start.*nothing is collected'): fitted(FGE(start=9), 2)
    class Stop(Callback):
        def after_epoch(self): raise CancelFitException
    ens = SnapshotEnsemble(2)
    with pytest.warns(UserWarning, match='the fit ended after 5 iterations.*10: nothing was collected'): fitted(ens, 4, cbs=[Stop()])
    with pytest.raises(RuntimeError, match='no members yet'): ens.validate(learner())

def test_interrupted_fit_keeps_what_there_is():
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch==3: raise KeyboardInterrupt
    ens,learn = SnapshotEnsemble(4),learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=[ens,Stop()])
    assert ens.n_members==3 and not [cb for cb in learn.cbs if isinstance(cb, (Ensemble,Stop))]
    with quiet(learn): torch.testing.assert_close(ens.get_preds(learn)[0], by_hand(learn, ens, X[200:300]).float(), atol=1e-6, rtol=1e-4)

# ---- stopping, going on, other processes

@pytest.mark.parametrize('new_object', [True,False])
@pytest.mark.parametrize('make', [lambda **kw: SnapshotEnsemble(4, **kw), lambda **kw: FGE(start=.2, cycle_len=1, **kw)])
def test_resume_from_files(make, new_object, tmp_path):
    ref,falling = make(),lambda: ParamScheduler({'lr': SchedLin(.2,.05)})       # the highest rate lies before the interruption
    whole,_ = fitted(ref, 4, shuffle=False, cbs=[falling()])
    class Cut(Callback):
        order = 3000
        def after_epoch(self):
            if self.epoch==1: self.learn.save('cut', with_opt=True)
            if self.epoch==2: raise KeyboardInterrupt             # after a member that the model which goes on has not seen
    ens,learn = make(keep_on=tmp_path/'m'),learner(shuffle=False, path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=[ens,Cut(),falling()])
    learn = learner(shuffle=False, path=tmp_path) if new_object else learn
    learn.load('cut', with_opt=True)
    if new_object: ens = make(keep_on=tmp_path/'m')
    fit(learn, 4, start_epoch=2, cbs=[ens,falling()])
    assert ens.collected==ref.collected and ens.n_members==ref.n_members
    for a,b in zip(ens.members, ref.members): torch.testing.assert_close(dict(a), dict(b), atol=1e-5, rtol=1e-4)

def test_resume_without_the_members_of_before(recwarn):
    ens = SnapshotEnsemble(4)
    with pytest.warns(UserWarning, match='2 members of the fit that goes on here are not there'): fit(learner(), 4, start_epoch=2, cbs=ens)
    assert ens.collected==[15,20]
    recwarn.clear()
    fit(learner(), 4, start_epoch=2, cbs=FGE())                  # begins later: nothing is missing
    assert not [o for o in recwarn if 'are not there' in str(o.message)]
    with pytest.warns(UserWarning, match='1 members'): fit(learner(), 4, start_epoch=2, cbs=SnapshotEnsemble(4, last=1))

def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path):
    learn = learner()
    before = state(learn.model)
    (tmp_path/'file').write_text('')
    for keep_on in tmp_path/'file',tmp_path/'file'/'below',*(() if torch.cuda.is_available() else ('cuda',)):
        with pytest.raises(ValueError, match="members cannot be kept there.*Try keep_on='cpu'"): fit(learn, 4, cbs=FGE(keep_on=keep_on))
    learn.path,learn.model_dir = tmp_path,'file'
    with pytest.raises(ValueError, match="keep_on='disk': members cannot be kept"): fit(learn, 4, cbs=FGE(keep_on='disk'))
    tasks = Path('/proc/self/task')                              # the superuser may write everywhere, and not there
    if tasks.exists():
        with pytest.raises(ValueError, match="members cannot be kept there"): fit(learn, 4, cbs=FGE(keep_on=tasks))
    assert same(before, state(learn.model))

def test_files_of_another_fit_are_not_overwritten(tmp_path):
    a = SnapshotEnsemble(2, keep_on=tmp_path/'m'); learn,_ = fitted(a, 2)
    was = [dict(o) for o in a.members]
    with pytest.raises(ValueError, match='holds 2 members of an earlier fit'): fitted(SnapshotEnsemble(2, keep_on=tmp_path/'m'), 2)
    assert all(alike(x,y) for x,y in zip(was, a.members))
    with pytest.raises(ValueError, match='holds 2 members of an earlier fit'): fitted(a, 3, learn=learn)         # not even its own: they are files to keep
    assert all(alike(x,y) for x,y in zip(was, a.members))
    (tmp_path/'m'/'member_best.pt').write_text('')               # somebody's
    assert SnapshotEnsemble().load(tmp_path/'m').n_members==2

def test_save_and_load(tmp_path):
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    ens.save(tmp_path/'e')
    with pytest.raises(ValueError, match='holds members already'): ens.save(tmp_path/'e')
    other,new = learner(s=7),FGE().load(tmp_path/'e')
    assert new.collected==ens.collected
    with quiet(learn), quiet(other):
        assert torch.equal(new.get_preds(other)[0], ens.get_preds(learn)[0])
        with pytest.raises(ValueError, match='of another model'): new.get_preds(learner(plain_net()))
    with pytest.raises(FileNotFoundError, match='no members'): FGE().load(tmp_path/'none')
    with pytest.raises(RuntimeError, match='no members to save'): FGE().save(tmp_path/'f')
    fitted(new, 2)
    assert len(list((tmp_path/'e').iterdir()))==3                # what was loaded stays on disk

def test_export_while_attached(tmp_path):
    ens = SnapshotEnsemble(3)
    learn,_ = tabular(tmp_path)
    learn.add_cb(ens)
    learn.export('before.pkl')
    fit(learn, 3)
    learn.export('after.pkl')
    assert (tmp_path/'after.pkl').stat().st_size<(tmp_path/'before.pkl').stat().st_size*1.2
    again = load_learner(tmp_path/'after.pkl')
    assert again.cbs and ens.n_members==3

def test_copies_have_members_of_their_own():
    ens = SnapshotEnsemble(2)
    a,b,c = deepcopy(ens),deepcopy(ens),pickle.loads(pickle.dumps(ens))
    fitted(a, 2)
    assert (a.n_members,b.n_members,c.n_members,SnapshotEnsemble().n_members,len(ens.store))==(2,0,0,0,0)
    learn,_ = fitted(b, 2, model=plain_net())
    with quiet(learn): a.validate(learner()); b.validate(learn)

# ---- members outlive whatever happens

class Exact(Callback):
    "All that a walk depends on, kept at the end of each epoch in `at`, and put back before the first batch of a fit that goes on"
    order = 3000
    def __init__(self, at=None, stop=None): self.at,self.stop,self.go_on = {},stop,at
    def before_train(self):
        if self.go_on is None: return
        model,opt,torch_,numpy_,python_,own = self.go_on
        self.learn.model.load_state_dict(model)
        self.learn.opt.load_state_dict(opt)
        torch.set_rng_state(torch_); np.random.set_state(numpy_); random.setstate(python_); self.learn.dls.train.rng.setstate(own)
        self.go_on = None
    def after_epoch(self):
        if not hasattr(self.learn, 'train_iter') or self.epoch+1 in self.at: return
        opt = deepcopy(self.learn.opt.state_dict())
        self.at[self.epoch+1] = state(self.model),opt,torch.get_rng_state(),np.random.get_state(),random.getstate(),self.learn.dls.train.rng.getstate()
        if self.epoch==self.stop: raise KeyboardInterrupt

class Walk(Callback):
    "What each step was made with, and where it led"
    order,run_valid = 1000,False
    def before_fit(self): self.steps = []
    def after_batch(self):
        hyper = self.learn.opt.hypers[-1]
        self.steps.append((hyper['lr'], hyper['mom'], self.learn.model[0].weight.detach().clone()))

def same_walk(a, b): return len(a)==len(b) and all(x[:2]==y[:2] and torch.equal(x[2], y[2]) for x,y in zip(a, b))

@pytest.mark.parametrize('keep_on', ['memory','folder'])
@pytest.mark.parametrize('k', [1,2,3])
@pytest.mark.parametrize('make,method', [(lambda **kw: SnapshotEnsemble(3, **kw), 'fit_one_cycle'), (lambda **kw: FGE(start=.4, cycle_len=.8, **kw), 'fit'),
                                         (lambda **kw: FGE(start=.4, cycle_len=.8, **kw), 'fit_one_cycle')], ids=['snapshots','fge','fge one cycle'])
def test_resumed_walk_equals_the_unbroken_one(make, method, k, keep_on, tmp_path):
    whole,walk = make(),Walk()
    fit(learner(net(.2)), 4, method=method, cbs=[whole,walk])
    at,ens = Exact(stop=k),make(**(dict(keep_on=tmp_path/'m') if keep_on=='folder' else {}))
    with pytest.raises(KeyboardInterrupt): fit(learner(net(.2)), 4, method=method, cbs=[ens,at])        # an epoch later than it goes on from
    if keep_on=='folder': ens = make(keep_on=tmp_path/'m')
    rest = Walk()
    fit(learner(net(.2), s=9), 4, method=method, start_epoch=k, cbs=[ens,rest,Exact(at.at[k])])
    assert same_walk(rest.steps, walk.steps[5*k:])
    assert [o['it'] for o in ens.store]==whole.collected==ens.collected
    assert all(alike(a,b) for a,b in zip(ens.members, whole.members))

def test_members_of_version_0_3_0_can_be_gone_on_with(tmp_path):
    "They do not say which momentum was held: the schedule does"
    whole,walk,at = FGE(start=.4, cycle_len=.8),Walk(),Exact(stop=3)
    fit(learner(), 4, method='fit_one_cycle', cbs=[whole,walk])
    with pytest.raises(KeyboardInterrupt): fit(learner(), 4, method='fit_one_cycle', cbs=[FGE(start=.4, cycle_len=.8, keep_on=tmp_path/'m'),at])
    for o in (tmp_path/'m').iterdir():
        m = torch.load(o)
        assert m.pop('moms') and m.pop('params')
        torch.save(m, o)
    ens,rest = FGE(start=.4, cycle_len=.8, keep_on=tmp_path/'m'),Walk()
    fit(learner(s=9), 4, method='fit_one_cycle', start_epoch=3, cbs=[ens,rest,Exact(at.at[3])])
    assert same_walk(rest.steps, walk.steps[15:]) and ens.n_members==3

class InRefresh(Callback):
    "Interrupts the refresh of the members that comes when the training is over"
    def __init__(self, exc=KeyboardInterrupt, times=1, after=2): self.exc,self.times,self.after,self.n = exc,times,after,0
    def before_batch(self):
        if self.training or not any(o.training for o in self.model.modules()): return
        self.n += 1
        if self.after<self.n<=self.after+self.times: raise self.exc

@pytest.mark.parametrize('keep_on', ['memory','folder'])
def test_killed_in_the_final_refresh(keep_on, tmp_path):
    make = lambda **kw: FGE(start=.4, cycle_len=.8, bn_batches=None, **kw)
    whole,data = make(),dict(shuffle=False)
    fit(learner(**data), 4, cbs=whole)
    ens,at = make(**(dict(keep_on=tmp_path/'m') if keep_on=='folder' else {})),Exact()
    learn = learner(**data)
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=[ens,at,InRefresh(after=7)])             # in that of the second of three
    if keep_on=='folder':
        ens,learn = make(keep_on=tmp_path/'m'),learner(s=9, **data)
        learn.model.load_state_dict(at.at[4][0])
    was = state(learn.model)
    fit(learn, 4, start_epoch=4, cbs=ens)
    assert ens.collected==whole.collected and ens.n_members==3 and same(was, state(learn.model))
    assert all(alike(a,b) for a,b in zip(ens.members, whole.members))

def flip_a_bit(file):
    "Of the first weight that the file holds"
    data,weight = bytearray(file.read_bytes()),torch.load(file)['state']['0.weight']
    data[data.index(weight.contiguous().numpy().tobytes())] ^= 1
    file.write_bytes(bytes(data))

def change(**kw):
    def f(file):
        m = torch.load(file)
        for k,g in kw.items(): m[k] = g(m[k])
        torch.save(m, file)
    return f
def weight(g): return change(state=lambda o: {k:g(v) if k=='0.weight' else v for k,v in o.items()})
def fill(v, to): v.view(-1)[3] = to; return v

@pytest.mark.parametrize('harm,say', [
    (flip_a_bit, 'damaged'), (lambda f: f.write_bytes(f.read_bytes()[:3000]), 'damaged'), (lambda f: torch.save([1], f), 'no weights'),
    (weight(lambda v: fill(v, math.nan)), '0.weight has values that are not finite'), (weight(lambda v: fill(v, math.inf)), 'not finite'), (weight(lambda v: v[:4]), 'of another model'),
    (change(state=lambda o: {k:v for k,v in o.items() if k!='0.weight'}), 'of another model'), (change(state=lambda o: {k:-v for k,v in o.items()}), 'running_var has variances below 0'),
    (change(it=lambda o: 7), 'name says iteration 10.* says 7'), (change(it=float), 'says 10.0'), (change(peaks=lambda o: None), 'learning rates'), (change(peaks=lambda o: [math.nan]), 'learning rates'),
    (change(moms=lambda o: 'a'), 'momentum'), (change(peaks=lambda o: o*2), 'parameter groups')])
def test_damaged_members_do_not_vote(harm, say, tmp_path):
    ens = SnapshotEnsemble(4, keep_on=tmp_path/'m'); learn,_ = fitted(ens, 4)
    other = SnapshotEnsemble(1); fitted(other, 1)
    was,file = other.members,tmp_path/'m'/'member_00000010.pt'
    harm(file)
    files = {o.name:o.read_bytes() for o in file.parent.iterdir()}
    if 'groups' not in say:
        with pytest.raises(ValueError, match=f'{file.name} .*{say}'): other.load(file.parent)
        assert other.n_members==1 and other.collected==[5] and alike(other.members[0], was[0])
    weights,go_on = state(learn.model),SnapshotEnsemble(4, keep_on=file.parent)
    with pytest.raises(ValueError, match=say if 'groups' in say else f'{file.name} .*{say}'): fit(learn, 4, start_epoch=3, cbs=go_on)
    assert go_on.n_members==0 and same(weights, state(learn.model)) and files=={o.name:o.read_bytes() for o in file.parent.iterdir()}
    if harm is flip_a_bit:
        for f in lambda: ens.get_preds(learn),lambda: ens.members,lambda: ens.save(tmp_path/'n'):
            with pytest.raises(ValueError, match=f'{file.name} cannot be read'): f()
        assert not list((tmp_path/'n').glob('*'))
        with quiet(learn): ens.validate(learn, last=2)             # those do vote
    fit(learn, 4, start_epoch=1, cbs=SnapshotEnsemble(4, keep_on=file.parent))                    # what comes later goes, in whatever state it is
    assert members.MemberFolder(file.parent).iters()==[5,10,15,20] and SnapshotEnsemble().load(file.parent).n_members==4

def test_members_of_another_model_are_not_gone_on_with(tmp_path):
    fitted(SnapshotEnsemble(4, keep_on=tmp_path/'m'), 4)
    with pytest.raises(ValueError, match='of another model'): fit(learner(plain_net()), 4, start_epoch=2, cbs=SnapshotEnsemble(4, keep_on=tmp_path/'m'))
    assert len(list((tmp_path/'m').iterdir()))==4

def test_a_constant_mask_is_no_damage(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.mask = net(),nn.Parameter(torch.tensor([0.]*9+[-math.inf]), requires_grad=False)
            self.register_buffer('range', torch.tensor([math.inf,-math.inf]))
        def forward(self, x): return self.net(x)+self.mask.nan_to_num(neginf=-9)
    m = Masked()
    for it in 5,10:
        with torch.no_grad(): m.net[0].weight += 1
        torch.save(members.make_member(m, it, [.1]), tmp_path/f'member_{it:08d}.pt')
    assert FGE().load(tmp_path).n_members==2

def no_space(monkeypatch, fails):
    "`fails(n)`: whether the n-th file finds no space"
    save,n = torch.save,[0]
    def full(obj, f, *args, **kw):
        n[0] += 1
        if fails(n[0]): raise OSError(28, 'No space left on device')
        return save(obj, f, *args, **kw)
    monkeypatch.setattr(torch, 'save', full)

@pytest.mark.parametrize('keep_on', ['disk','path'])
def test_a_full_disk_does_not_end_the_training(keep_on, tmp_path, monkeypatch, recwarn):
    ref,ens = SnapshotEnsemble(4, bn_batches=1),SnapshotEnsemble(4, keep_on=tmp_path/'m' if keep_on=='path' else 'disk', bn_batches=1)
    fitted(ref, 4)
    no_space(monkeypatch, lambda n: n in (2,3,6))               # two members, and one refresh
    learn,spy = fitted(ens, 4, path=tmp_path)
    assert sum('No space left' in str(o.message) and 'kept in memory' in str(o.message) for o in recwarn)==1 and len(spy.ws)==20
    assert ens.collected==ref.collected and all(alike(a,b) for a,b in zip(ens.members, ref.members))
    folder = tmp_path/'m' if keep_on=='path' else ens.store.folder.path
    assert not list(folder.glob('*.tmp'))
    with quiet(learn): ens.validate(learn)
    with pytest.raises(OSError, match='No space'):
        no_space(monkeypatch, lambda n: n==3)
        ens.save(tmp_path/'all')
    assert not list((tmp_path/'all').iterdir())                 # all or none
    monkeypatch.undo()
    ens.save(tmp_path/'all')
    assert all(alike(a,b) for a,b in zip(SnapshotEnsemble().load(tmp_path/'all').members, ref.members))

def test_a_disk_that_is_full_for_one_process_is_full_for_all(tmp_path, monkeypatch):
    "The first one writes for all of a distributed fit: where it cannot, none may expect a file"
    ens = SnapshotEnsemble(2, keep_on=tmp_path/'m')
    monkeypatch.setattr(members, 'together', lambda shared: contextlib.nullcontext(SimpleNamespace(gather=lambda why: [why, 'No space left', None])))
    with pytest.warns(UserWarning, match='No space left.*kept in memory'): fitted(ens, 2)
    assert all(isinstance(o, dict) for o in ens.store.kept) and ens.n_members==2

def test_a_member_that_cannot_be_removed_does_not_end_the_training(tmp_path, monkeypatch):
    ens = SnapshotEnsemble(4, last=2, keep_on=tmp_path/'m')
    unlink = Path.unlink
    def stuck(self, **kw):
        if self.suffix=='.pt': raise PermissionError(13, 'not permitted')
        unlink(self, **kw)
    monkeypatch.setattr(Path, 'unlink', stuck)
    with pytest.warns(UserWarning, match='member_00000005.pt could not be removed.*remove it by hand'): fitted(ens, 4)
    assert ens.n_members==2 and ens.collected==[5,10,15,20]

def test_what_killed_runs_left_is_no_member_and_goes(tmp_path):
    for o in 'member_00000005.pt.0123456789ab.tmp','member_00000005.pt.tmp','member_best.pt.tmp','member_5.pt': (tmp_path/o).write_text('')
    ens = SnapshotEnsemble(2, keep_on=tmp_path)
    fitted(ens, 2)
    assert sorted(o.name for o in tmp_path.iterdir())==['member_00000005.pt','member_00000010.pt','member_5.pt','member_best.pt.tmp']
    assert SnapshotEnsemble().load(tmp_path).n_members==2

@pytest.mark.parametrize('exc', [getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)('CUDA out of memory. Tried to'), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
                         ids=lambda o: type(o).__name__)
def test_out_of_memory_in_the_refresh(exc, recwarn):
    make = lambda: FGE(start=.4, cycle_len=.8, bn_batches=None)
    whole,running,ens = make(),FGE(start=.4, cycle_len=.8),make()
    for o in whole,running: fit(learner(shuffle=False), 4, cbs=o)
    learn = learner(shuffle=False)
    fit(learn, 4, cbs=[ens,InRefresh(exc, after=5, times=99)])                     # 5 batches for the first of three members
    assert sum('not enough memory' in str(o.message) for o in recwarn)==1
    for k,ref in enumerate((whole,running,running)): assert alike(ens.members[k], ref.members[k])
    assert not [cb for cb in learn.cbs if isinstance(cb, (Ensemble,InRefresh))] and not ens.in_fit
    fit(learn, 4, start_epoch=4, cbs=ens)
    assert all(alike(a,b) for a,b in zip(ens.members, whole.members))
    with pytest.raises(Exception, match='a mistake'): fit(learner(), 4, cbs=[make(),InRefresh(RuntimeError('a mistake'))])

def test_a_member_that_is_damaged_before_its_refresh(tmp_path):
    ens = FGE(start=.4, cycle_len=.8, bn_batches=1, keep_on=tmp_path/'m')
    class Harm(Callback):
        order = -100
        def after_fit(self): flip_a_bit(tmp_path/'m'/'member_00000016.pt')
    with pytest.warns(UserWarning, match='member_00000016.pt cannot be read'): fitted(ens, 4, cbs=[Harm()])
    assert ens.n_members==3

@pytest.mark.parametrize('exc', [CancelValidException, CancelEpochException, CancelFitException])
def test_passes_that_somebody_cancels(exc):
    class Shapes(Callback):
        def before_batch(self): self.learn.xb = self.learn.xb
    class Always(Shapes):
        def before_validate(self): raise exc
    class Once(Shapes):
        n = 0
        def after_pred(self):
            self.n += 1
            if self.n==self.at: raise exc
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    was = state(learn.model)
    for cb,at in (Always(),0),(Once(),1),(Once(),3),(Once(),4):                       # of 2 batches for each member
        cb.at = at
        with quiet(learn), learn.added_cbs(cb):
            for f in ens.validate,ens.get_preds:
                cb.n = 0
                with pytest.raises(RuntimeError, match='removed_cbs'): f(learn)
        assert same(was, state(learn.model))
    class Few(Shapes):
        "The first batch only, each time: that is what the learner's own validation sees"
        def before_validate(self): self.n = 0
        def before_batch(self):
            self.n += 1
            if self.n==2: raise CancelValidException
    hand = by_hand(learn, ens, X[200:264])
    with quiet(learn), learn.added_cbs(Few()): torch.testing.assert_close(ens.get_preds(learn, reorder=False)[0], hand.float(), atol=1e-6, rtol=1e-4)

class Merging(nn.Linear):
    "As LoRA layers do it: in evaluation mode the factor is merged into the weight"
    def __init__(self, *args):
        super().__init__(*args)
        self.factor = nn.Parameter(torch.ones(self.out_features, 1)*2)
    def forward(self, x): return F.linear(x, self.weight*self.factor if self.training else self.weight, self.bias)
    def train(self, mode=True):
        if mode!=self.training:
            with torch.no_grad(): self.weight.data *= 1/self.factor if mode else self.factor
        return super().train(mode)

@pytest.mark.parametrize('keep_on', ['cpu','folder'])
def test_layers_that_merge_in_evaluation(keep_on, tmp_path):
    def model():
        seed()
        return nn.Sequential(nn.Flatten(), nn.Linear(64,20), nn.BatchNorm1d(20), nn.ReLU(), Merging(20,10))
    ens = SnapshotEnsemble(3, keep_on=tmp_path/'m' if keep_on=='folder' else 'cpu', bn_batches=None)
    learn,spy = fitted(ens, 3, model=model())
    was = [{k:v.clone() for k,v in o.items()} for o in ens.members]
    for it,member in zip(ens.collected, ens.members): assert all(torch.equal(member[k], w) for (k,_),w in zip(learn.model.named_parameters(), spy.ws[it-1]))
    hand = []
    for m in was:
        one = model()
        one.load_state_dict(m)                                    # in training mode
        with torch.no_grad(): hand.append(one.eval()(X[200:300]).double().softmax(1))
    for mode in False,True:
        learn.model.train(mode)
        with quiet(learn): preds,_ = ens.get_preds(learn)
        torch.testing.assert_close(preds, torch.stack(hand).mean(0).float(), atol=1e-6, rtol=1e-4)
    assert all(alike(a,b) for a,b in zip(was, ens.members))       # nothing was merged into them
    learn.model.train()
    for p,w in zip(learn.model.parameters(), spy.ws[-1]): torch.testing.assert_close(p.detach(), w, atol=1e-6, rtol=1e-5)

# ---- Ctrl-C at any line

HALF_DONE = 'swapped_state put _write take _keep _drop drop resume_or_reset training_ends _measure_bn measured_member vote predict save load'.split()      # others read, and change nothing

def interrupted_at(n, f):
    "Run `f`, with Ctrl-C at the n-th line that it executes in functions of the module where something may be half-done; which lines these were"
    lines = []
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in (ensemble.__file__, members.__file__, voting.__file__) or frame.f_code.co_name not in HALF_DONE: return
        if event=='line':
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines)==n:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace if len(lines)<n or not n else None
    sys.settrace(trace)
    try: f()
    except KeyboardInterrupt: assert n
    finally: sys.settrace(None)
    return lines

def places(lines):
    "The last time that each line is executed"
    return sorted({o:i+1 for i,o in enumerate(lines)}.values())

class Tiny(Learner):
    def predict(self, item): return self.get_preds(dl=self.dls.valid)

def tiny(path='.'):
    seed()
    data = DataLoaders(FastaiDataLoader(list(zip(X[:8],Y[:8])), bs=4), FastaiDataLoader(list(zip(X[8:14],Y[8:14])), bs=3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,4), nn.BatchNorm1d(4), nn.Linear(4,10))
    return Tiny(data, model, loss_func=CrossEntropyLossFlat(), opt_func=sgd, lr=.1, path=path, model_dir='.')

def test_interrupted_at_any_line_of_a_fit(tmp_path):
    class Last(Callback):
        order = 50                                           # before the ensemble looks at a batch
        def before_fit(self): self.state,self.was = None,None
        def after_pred(self):
            if self.training: self.state = state(self.model)
        def after_batch(self):
            if self.training: self.state = state(self.model)
    def run(n):
        learn,last,folder = tiny(),Last(),tmp_path/f'{n}'
        ens = FGE(start=0, cycle_len=1, last=2, bn_batches=1, keep_on=folder)
        cbs = [type(o) for o in learn.cbs]
        with quiet(learn): lines = interrupted_at(n, lambda: learn.fit(3, cbs=[ens,last]))
        its = [o['it'] for o in ens.store]
        assert its==ens.collected[-2:] and (not n or last.state is None or same(state(learn.model), last.state))
        assert members.MemberFolder(folder).iters()==its and (not its or len(list(folder.iterdir()))==len(its))
        assert [type(o) for o in learn.cbs]==cbs and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return lines
    lines = run(0)
    assert len(set(lines))>40
    for n in places(lines): run(n)

def test_interrupted_at_any_line_of_a_vote(tmp_path):
    learn,ens = tiny(),SnapshotEnsemble(2, keep_on=tmp_path/'m')
    fit(learn, 2, cbs=ens)
    was,cbs,attrs = state(learn.model),list(learn.cbs),set(vars(learn))
    def save():
        try: ens.save(tmp_path/'s')
        except KeyboardInterrupt: assert len(list((tmp_path/'s').glob('*'))) in (0,2); raise
        finally: shutil.rmtree(tmp_path/'s', ignore_errors=True)
    with quiet(learn):
        for f in lambda: ens.predict(learn, None),save,lambda: ens.load(tmp_path/'m'):
            for n in [0,*places(interrupted_at(0, f))]:
                interrupted_at(n, f)
                assert same(was, state(learn.model)) and [type(o) for o in learn.cbs]==[type(o) for o in cbs if not isinstance(o, ProgressCallback)]
                assert 'get_preds' not in vars(learn) and set(vars(learn))<=attrs|{'dl','xb','yb','x','y','pred','loss','loss_grad','iter','n_iter','epoch','n_epoch','training','b'}
                assert [o['it'] for o in ens.store]==ens.collected==[2,4]
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_taken_away_for_a_while_and_then_for_good():
    ens = SnapshotEnsemble(2)
    learn = learner(cbs=ens)
    fit(learn, 2)
    with learn.removed_cbs(ens): fit(learn, 1)
    fit(learn, 2)
    assert ens.collected==[5,10]
    with learn.removed_cbs([cb for cb in learn.cbs if cb is ens]): pass
    learn.remove_cb(ens)
    was = [type(cb) for cb in learn.cbs]
    fit(learn, 1)
    assert not [cb for cb in learn.cbs if 'fastswa' in type(cb).__module__] and was==[type(cb) for cb in learn.cbs]

def test_numbers_are_numbers():
    for n in np.array(3),np.int64(3),torch.tensor(3):
        ens = SnapshotEnsemble(n, lr_max=Fraction(1,20), last=n, bn_batches=n)
        assert (ens.n_cycles,ens.last,ens.bn_batches,ens.lr_max)==(3,3,3,.05) and type(ens.n_cycles) is int
        fitted(ens, 3)
        assert snapshot_cycles(n, np.array(5), n)==snapshot_cycles(3, 5, 3)
    for start,length in (Fraction(2,5),Fraction(4,5)),(np.array(.4),np.array(.8)),(torch.tensor(.4, dtype=torch.float64),np.float64(.8)):
        fge = FGE(start=start, cycle_len=length, lr_max=np.array(.05), lr_min=Fraction(1,1000), bn_batches=np.array(0))
        fitted(fge, 4)
        assert fge.collected==[12,16,20] and fge_cycles(np.array(4), 5, start, length)==fge_cycles(4, 5, .4, .8)
    assert FGE(start=np.array(2)).start==2
    ens = SnapshotEnsemble(3); learn,_ = fitted(ens, 3)
    with quiet(learn): assert torch.equal(ens.get_preds(learn, np.array(1), last=np.array(2))[0], ens.get_preds(learn, last=2)[0])

# ---- messages

@pytest.mark.parametrize('start', ['x', 1.5, -1, math.nan, True])
def test_fge_speaks_of_its_cycles(start):
    for f in lambda: FGE(start=start),lambda: fge_cycles(4, 5, start):
        with pytest.raises((TypeError,ValueError), match='cycles') as e: f()
        assert 'averag' not in str(e.value) and f'start={start!r}' in str(e.value)

@pytest.mark.parametrize('cls', [SnapshotEnsemble, FGE])
def test_help_shows_parameters_and_an_example(cls):
    import inspect
    doc = inspect.getdoc(cls)
    for name in list(inspect.signature(cls).parameters): assert f'\n    {name}' in doc
    assert 'files that go with this object' in doc and 'learn.fit(' in doc and 'get_preds(learn)' in doc

@pytest.mark.parametrize('f,exc,say', [
    (lambda: SnapshotEnsemble(0), ValueError, 'n_cycles=0'), (lambda: SnapshotEnsemble(None), TypeError, 'n_cycles=None: give a positive number of cycles'), (lambda: SnapshotEnsemble(2.5), TypeError, 'n_cycles'),
    (lambda: SnapshotEnsemble(lr_max=-1), ValueError, 'lr_max'), (lambda: SnapshotEnsemble(lr_max='a'), TypeError, 'lr_max'), (lambda: SnapshotEnsemble(last=0), ValueError, 'last=0: give a positive number of members'),
    (lambda: SnapshotEnsemble(last='x'), TypeError, 'last'), (lambda: FGE(start=1.), ValueError, 'start=1.0'), (lambda: FGE(start='x'), TypeError, 'start'), (lambda: FGE(cycle_len=0), ValueError, 'cycle_len=0'),
    (lambda: FGE(lr_max=.1, lr_min=.2), ValueError, 'swap'), (lambda: FGE(lr_min='x'), TypeError, 'lr_min'), (lambda: FGE(bn_batches=-1), ValueError, 'bn_batches=-1'), (lambda: FGE(bn_batches=1.5), TypeError, 'bn_batches'),
    (lambda: FGE(keep_on='gpu'), ValueError, "keep_on='gpu'"), (lambda: FGE(keep_on=3.5), TypeError, 'keep_on=3.5'), (lambda: FGE(keep_on=0), TypeError, 'keep_on=0'), (lambda: FGE(bn_batches=False), TypeError, 'bn_batches=False'), (lambda: FGE(bn_batches=True), TypeError, 'bn_batches=True')])
def test_bad_arguments(f, exc, say):
    with pytest.raises(exc, match=say): f()

def test_other_messages():
    with pytest.raises(RuntimeError, match='before a fit'): FGE().plot_sched()
    with pytest.raises(ValueError, match='swap them'): fitted(FGE(lr_max=[.1,.1], lr_min=[.2,.2]), 4, splitter=two_groups)
    with pytest.warns(UserWarning, match='members are taken where the rate is highest'): fitted(FGE(lr_min=.5), 5)
    ens = SnapshotEnsemble(2); learn,_ = fitted(ens, 2)
    with pytest.raises(TypeError, match='needs the learner'): ens.validate(None)
    with pytest.raises(TypeError, match='needs the learner'): ens.validate(learn.model)
    with pytest.raises(ValueError, match='attached to the learner already'): fit(learner(cbs=ens), 1, cbs=ens)
    assert repr(ens).startswith('SnapshotEnsemble(n_members=')

def test_pictures_of_the_schedules():
    for ens in SnapshotEnsemble(3),FGE(start=.4, cycle_len=1):
        learn,spy = fitted(ens, 4)
        line,dots = ens.plot_sched().get_lines()
        np.testing.assert_allclose(dots.get_xdata()*5, ens.collected)
        np.testing.assert_allclose(dots.get_ydata(), [spy.lrs[o-1][0] for o in ens.collected])
        y = line.get_ydata(); np.testing.assert_allclose(y[~np.isnan(y)], [o[0] for o in spy.lrs])
        assert np.isnan(y).sum()==(2 if isinstance(ens, SnapshotEnsemble) else 0)      # a restart is a jump, a triangle is not

# ---- what is easily got wrong

class NumpySampler(torch.utils.data.Sampler):
    def __init__(self, rng): self.rng = rng
    def __iter__(self): return iter(self.rng.permutation(200).tolist())
    def __len__(self): return 200

@pytest.mark.parametrize('rng', [np.random.default_rng(0), np.random.RandomState(0)], ids=['Generator','RandomState'])
def test_samplers_with_random_streams_of_their_own(rng):
    ens = SnapshotEnsemble(3)
    learn,_ = fitted(ens, 3)
    dl = torch.utils.data.DataLoader(list(zip(X[:200],Y[:200])), 30, sampler=NumpySampler(rng))
    with quiet(learn): loss,acc = ens.validate(learn, dl=dl)
    assert loss==pytest.approx(F.nll_loss(by_hand(learn, ens, X[:200]).log(), Y[:200]).item(), rel=1e-4)

def test_members_that_see_different_items_are_noticed():
    class Fresh:
        def permutation(self, n): return np.random.default_rng().permutation(n)         # nobody can wind that back
    ens = SnapshotEnsemble(2)
    learn,_ = fitted(ens, 2)
    with pytest.raises(ValueError, match='different items'), quiet(learn): ens.validate(learn, dl=torch.utils.data.DataLoader(list(zip(X[:200],Y[:200])), 30, sampler=NumpySampler(Fresh())))

def test_targets_that_are_no_numbers():
    seed()
    y = multi.clone(); y[210] = math.nan
    data = DataLoaders(FastaiDataLoader(list(zip(X[:200],y[:200])), bs=40), FastaiDataLoader(list(zip(X[200:300],y[200:300])), bs=64))
    learn,ens = Learner(data, net(), loss_func=MSELossFlat(), opt_func=sgd, lr=.02),SnapshotEnsemble(2)
    fit(learn, 2, cbs=ens)
    with quiet(learn): assert torch.isfinite(ens.get_preds(learn)[0]).all() and math.isnan(ens.validate(learn)[0])

@pytest.mark.parametrize('first', [0.,math.nan])
def test_first_batch_may_be_special(first):
    "Uniform probabilities are their own softmax, and what is no number has no inverse"
    seed()
    x = torch.randn(200,4); y = (x[:,0]>0).long()
    data = DataLoaders(FastaiDataLoader(list(zip(x[:100],y[:100])), bs=20), FastaiDataLoader([(torch.full((4,),first),torch.tensor(0))]*20+list(zip(x[100:],y[100:])), bs=20))
    learn,ens = Learner(data, nn.Linear(4,2,bias=False), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.5),SnapshotEnsemble(2)
    fit(learn, 4, cbs=ens)
    with quiet(learn):
        p,t = ens.get_preds(learn)
        np.testing.assert_allclose(ens.validate(learn)[0], F.nll_loss(p.log(), t).item(), rtol=1e-4)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(axis=1), LabelSmoothingCrossEntropyFlat(axis=1), LabelSmoothingCrossEntropy(), nn.CrossEntropyLoss(), FocalLossFlat(axis=1)], ids=lambda o: type(o).__name__)
def test_classes_of_pixels(loss):
    seed()
    t = (X[:,0]>.5).long()
    data = DataLoaders(FastaiDataLoader(list(zip(X[:100],t[:100])), bs=20, shuffle=True), FastaiDataLoader(list(zip(X[100:150],t[100:150])), bs=32))
    learn,ens = Learner(data, nn.Conv2d(1,3,3,padding=1), loss_func=loss, opt_func=sgd, lr=.01, metrics=foreground_acc),SnapshotEnsemble(1)
    fit(learn, 2, cbs=ens)
    with quiet(learn):
        np.testing.assert_allclose(ens.validate(learn), learn.validate(), rtol=1e-4)        # an ensemble of one is the learner
        torch.testing.assert_close(ens.get_preds(learn)[0].sum(1), torch.ones(50,8,8))

def test_buffers_that_grow():
    class Grows(nn.Module):
        def __init__(self): super().__init__(); self.net = net(); self.register_buffer('seen', torch.zeros(0))
        def forward(self, x):
            if self.training: self.seen = torch.cat([self.seen, x.mean()[None].detach()])
            return self.net(x)+self.seen.sum()
    ens = SnapshotEnsemble(2, bn_batches=None)
    learn,_ = fitted(ens, 2, model=Grows())
    was = learn.model.seen.clone()
    assert [len(o['seen']) for o in ens.members]==[5,10]
    with quiet(learn): preds,_ = ens.get_preds(learn)
    assert torch.equal(learn.model.seen, was) and torch.isfinite(preds).all() and [len(o['seen']) for o in ens.members]==[5,10]

def test_outputs_that_are_no_floats():
    class Many(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): o = self.net(x); return o,o>-100,(o>-100).to(torch.uint8)*200
    seed()
    learn,ens = Learner(dls(), Many(), loss_func=lambda o,y: F.cross_entropy(o[0], y), opt_func=sgd, lr=.02),SnapshotEnsemble(3)
    fit(learn, 3, cbs=ens)
    with quiet(learn): (a,b,c),_ = ens.get_preds(learn)
    assert (b==1).all() and (c==200).all()

def test_highest_rate_of_a_fit_that_goes_on():
    whole,rest = FGE(start=.5, cycle_len=1),FGE(start=.5, cycle_len=1)
    _,a = fitted(whole, 6, method='fit_one_cycle')
    b,learn = Spy(),learner()
    with pytest.warns(UserWarning, match='members of the fit that goes on here are not there'): fit(learn, 6, method='fit_one_cycle', start_epoch=4, cbs=[rest,b])
    np.testing.assert_allclose(b.lrs, a.lrs[20:], rtol=1e-2)            # 51 places of the schedule are looked at

def test_loaded_members_of_its_own_folder_are_its_own(tmp_path):
    f = tmp_path/'m'
    fit(learner(), 4, cbs=SnapshotEnsemble(4, keep_on=f, last=2))
    ens = SnapshotEnsemble(8, keep_on=f, last=2).load(f)
    fit(learner(), 8, cbs=ens, start_epoch=4)
    assert members.MemberFolder(f).iters()==[35,40] and ens.n_members==2

def test_no_rate_no_members_worth_having():
    for ens in FGE(lr_max=0, start=.5),SnapshotEnsemble(2, lr_max=0):
        with pytest.warns(UserWarning, match='the learning rate is 0 in all cycles'): fitted(ens, 4)

def test_learner_without_validation_data():
    learn,ens = learner(),SnapshotEnsemble(2)
    fit(learn, 2, cbs=ens)
    learn.dls = DataLoaders(learn.dls.train)
    for f in ens.validate,ens.get_preds:
        with pytest.raises(ValueError, match='no DataLoader 1.*give dl='): f(learn)
    valid = FastaiDataLoader(list(zip(X[200:300],Y[200:300])), bs=64)
    with quiet(learn):
        preds,_ = ens.get_preds(learn, valid)                            # without its name
        torch.testing.assert_close(preds, by_hand(learn, ens, X[200:300]).float(), atol=1e-5, rtol=1e-4)
        assert ens.validate(learn, valid)[1]==pytest.approx((preds.argmax(1)==Y[200:300]).float().mean().item())
