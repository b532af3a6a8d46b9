"Pictures of the loss surface: what is drawn is what the models do, and the learner is left as it was"
import inspect, math, random, signal, sys, warnings
from copy import deepcopy

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from matplotlib.colors import BoundaryNorm
from torch import nn
from common import *
from fastswa import landscape, learner as L_
from fastswa.average import WeightAverage
from fastswa.batchnorm import update_bn
from fastswa.learner import trained_layers
from fastswa.callback import SWA
from fastswa.landscape import *
from fastswa import surface
from fastswa.landscape import _levels,_norm,plane,ray,width
from fastswa.surface import join_batches,keep_batches,read_weights
from test_applications import tabular,text,torch_loaders,vision

TR,VL,VE = 'training loss','validation loss','validation error, %'

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def jitter(model, s, size=.3):
    "A state dict some way off, in a direction that `s` decides"
    g = torch.Generator().manual_seed(s)
    sd = state(model)
    for k,p in model.named_parameters(): sd[k] = p.detach()+size*p.detach().abs().mean()*torch.randn(p.shape, generator=g)
    return sd

def made(model=None, **kw):
    "A learner, trained a little, and three sets of weights around it"
    l = learner(model, **kw)
    fit(l, 2)
    return l,[jitter(l.model, i) for i in range(3)]

def calm(f, learn, *args, **kw):
    with learn.no_bar(): return f(learn, *args, **kw)

def direct(learn, named, n_train=None, n_valid=None, refresh=True):
    "Loss on training batches, loss and error on validation batches, by hand: own copy of the model, own statistics, own sums"
    st = torch.get_rng_state(),random.getstate(),np.random.get_state()
    loaders = [deepcopy(o) for o in learn.dls]      # or their own streams would move on
    tr,va = join_batches(keep_batches(loaders[0], n_train, False)),keep_batches(loaders[1], n_valid, True)
    torch.set_rng_state(st[0]); random.setstate(st[1]); np.random.set_state(st[2])
    m = deepcopy(learn.model)
    m.load_state_dict(named, strict=False)
    if refresh: update_bn(m.train(), tr)
    m.eval()
    def mean(bs, f):
        with torch.no_grad(): vals = [(f(m(b[0]), b[1]).item()*len(b[1]), len(b[1])) for b in bs]
        return sum(v for v,_ in vals)/sum(n for _,n in vals)
    ce = nn.functional.cross_entropy
    return {TR:mean(tr, ce), VL:mean(va, ce), VE:100*mean(va, lambda o,y: (o.argmax(1)!=y).float().mean())}

def close(a, b, tol=1e-4): return a.keys()==b.keys() and all(abs(a[k]-b[k])<=tol*max(1,abs(b[k])) for k in a)

# ---- values

def test_plane_against_direct_evaluation():
    l,ws = made()
    p = calm(plane, l, ws, n=5)
    assert set(p.values)=={TR,VL,VE} and all(v.shape==(len(p.ys),len(p.xs)) and v.dtype==float for v in p.values.values())
    for j,i in ((0,0),(2,1),(len(p.ys)-1,len(p.xs)-1)):
        assert close({h:v[j,i] for h,v in p.values.items()}, direct(l, p.weights(p.xs[i],p.ys[j])))
    assert len({round(float(o),5) for o in p.values[VL].flat})>15

def test_points_and_average_are_where_the_values_say():
    l,ws = made()
    p = calm(plot_plane, l, dict(a=ws[0], b=ws[1], c=ws[2]), n=4)
    assert list(p.points)==['a','b','c','mean']
    mean = {k:sum(w[k].float() for w in ws)/3 for k in ws[0]}
    flat = lambda w: torch.cat([w[k].flatten().double() for k,_ in l.model.named_parameters()])
    o,u,v = (torch.cat([d[k].flatten().double() for k,_ in l.model.named_parameters()]) for d in p.basis)
    assert abs(u@u-1)<1e-5 and abs(v@v-1)<1e-5 and abs(u@v)<1e-5
    for name,w in zip(p.points, [*ws,mean]):
        x,y = p.points[name]
        assert (flat(w)-o)@u==pytest.approx(x, abs=1e-4) and (flat(w)-o)@v==pytest.approx(y, abs=1e-4)     # by projection
        torch.testing.assert_close(flat(p.weights(x,y)), flat(w), atol=1e-5, rtol=1e-5)
        named = {k:w[k] for k,_ in l.model.named_parameters()}
        assert close(p.at[name], direct(l, named), 1e-4)
        for ax in p.fig.axes[:3]:
            line, = [o for o in ax.lines if o.get_label()==name]
            assert (line.get_xdata()[0],line.get_ydata()[0])==(x,y) and name in [t.get_text() for t in ax.texts]
    assert p.points['a']==(0,0) and p.points['b'][1]==0 and p.points['c'][1]>0
    lo,hi = np.array(list(p.points.values())).min(0),np.array(list(p.points.values())).max(0)
    assert (p.xs[0]<lo[0]) and (p.xs[-1]>hi[0]) and p.ys[0]<lo[1] and p.ys[-1]>hi[1]
    np.testing.assert_allclose([*np.diff(p.xs), *np.diff(p.ys)], p.xs[1]-p.xs[0])
    assert repr(p).startswith(f'Plane of {len(p.xs)} x {len(p.ys)} places') and f"{p.at['mean'][VL]:.4g}" in repr(p) and repr(p).count('\n')==5

def test_margin_and_n():
    l,ws = made(plain_net())
    for n,margin in ((4,0),(7,1.)):
        p = calm(plane, l, ws, n=n, margin=margin, n_train=1, n_valid=1)
        size = np.ptp(np.array(list(p.points.values())), 0)
        assert max(len(p.xs),len(p.ys))==n
        assert max(np.ptp(p.xs),np.ptp(p.ys))==pytest.approx(size.max()*(1+2*margin))

def test_ray_passes_through_both_ends():
    l,ws = made()
    r = calm(plot_ray, l, ws[0], ws[1], names=('A','B'), n=6, lo=-.3, hi=1.2)
    assert r.ts[0]==-.3 and r.ts[-1]==1.2 and {0.,1.}<=set(r.ts.tolist()) and len(r.ts)==7 and (np.diff(r.ts)>0).all()
    assert r.length==pytest.approx(_norm([a-b for a,b in zip(read_weights(l,ws[0],''),read_weights(l,ws[1],''))]))
    for name,w,t in (('A',ws[0],0),('B',ws[1],1)):
        want = direct(l, {k:w[k] for k,_ in l.model.named_parameters()})
        assert close(r.at[name], want) and close({h:v[r.ts.tolist().index(t)] for h,v in r.values.items()}, want)
    for i in (0,4,6): assert close({h:v[i] for h,v in r.values.items()}, direct(l, r.weights(r.ts[i])))
    for ax,h in zip(r.fig.axes, r.values):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), r.values[h])
        np.testing.assert_allclose(ax.lines[0].get_xdata(), r.ts*r.length)
        assert ax.get_ylabel()==h and ax.get_xlabel()=='distance in weight space' and {t.get_text() for t in ax.texts}=={'A','B'}
        top, = ax.child_axes
        r.fig.canvas.draw()
        np.testing.assert_allclose(top.get_xlim(), np.array(ax.get_xlim())/r.length)
        assert top.get_xlabel()=='t'
    assert f'length {r.length:.4g}' in repr(r) and 'lowest at t' in repr(r) and f'{r.ts[r.values[VL].argmin()]:.4g}' in repr(r)
    assert calm(ray, l, ws[0], ws[1], n=9, n_train=1, n_valid=1, metric=False).ts.tolist()==np.linspace(-.5,1.5,9).tolist()   # ends not twice

def test_width_same_directions_right_radius(monkeypatch):
    l,ws = made()
    seen,moved = [],surface._move
    def move(to, origin, steps):
        moved(to, origin, steps)
        seen.append(torch.cat([(a-o).flatten() for a,o in zip(to,origin)]))
    monkeypatch.setattr(surface, '_move', move)
    w = calm(plot_width, l, dict(a=ws[0], b=ws[1]), radius=3, n=3, n_dirs=2)
    np.testing.assert_allclose(w.radii, [0,1.5,3])
    np.testing.assert_allclose([o.norm() for o in seen], [0,0]+[1.5,3]*4, rtol=1e-4)
    a1,a2,b1,b2,c1,c2,d1,d2 = seen[2:]
    torch.testing.assert_close(a1, b1, atol=1e-5, rtol=1e-3); torch.testing.assert_close(2*a1, a2, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(c2, d2, atol=1e-5, rtol=1e-3)
    assert abs(a2@c2)/9<.2                       # another direction
    origin = dict(zip(dict(l.model.named_parameters()), read_weights(l, ws[1], '')))
    vec,at = b2,0
    for k,p in origin.items(): origin[k] = p+vec[at:at+p.numel()].view(p.shape); at += p.numel()
    assert close({h:v['b'][0,2] for h,v in w.values.items()}, direct(l, origin))
    assert all(v['a'].shape==(2,3) and (v['a'][:,0]==v['a'][0,0]).all() for v in w.values.values())
    for ax,h in zip(w.fig.axes, w.values):
        bold = {o.get_label():o for o in ax.lines if not o.get_label().startswith('_')}
        for k in 'ab': np.testing.assert_allclose(bold[k].get_ydata(), w.values[h][k].mean(0))
        assert len(ax.lines)==6 and ax.get_ylabel()==h and ax.get_xlabel()=='distance in weight space' and ax.get_legend()
        assert bold['a'].get_linestyle()!=bold['b'].get_linestyle()
    assert 'a, at 0' in repr(w) and 'b, at 3' in repr(w) and 'mean of 2 directions' in repr(w)
    again,other = (calm(width, l, dict(a=ws[0]), radius=3, n=2, n_dirs=1, seed=s).values[VL]['a'][0,1] for s in (0,1))
    assert again==pytest.approx(w.values[VL]['a'][0,2]) and other!=again

def test_filterwise_is_blind_to_scale():
    l,_ = made()
    small,big = state(l.model),state(l.model)
    for k in '0.weight','3.weight': big[k] *= 4                      # both are followed by BatchNorm
    for k in '0.bias','3.bias': big[k] *= 4
    w = calm(plot_width, l, dict(small=small, big=big), filterwise=True, n=3, n_dirs=3)
    for v in w.values.values(): np.testing.assert_allclose(v['small'], v['big'], atol=2e-2 if v is not w.values[VE] else 2.1)
    np.testing.assert_allclose(w.values[VL]['small'], w.values[VL]['big'], rtol=5e-3)
    assert w.radii[-1]==.5 and 'norms of the filters' in w.fig.axes[0].get_xlabel()
    plain = calm(width, l, dict(small=small, big=big), n=3, n_dirs=3).values[VL]
    assert (plain['small'][:,-1]/plain['big'][:,-1]).mean()>1.1      # 20 seeds: 1.23 to 1.51
    raw = [torch.randn(4,3,2),torch.randn(5)]
    there = torch.randn(4,3,2)*torch.arange(4.).view(-1,1,1)
    d = landscape._direction(raw, [there, torch.ones(5)], True)
    torch.testing.assert_close(d[0].flatten(1).norm(dim=1), there.flatten(1).norm(dim=1))
    assert d[1].abs().sum()==0 and d[0][0].norm()==0 and len(set(torch.nn.functional.cosine_similarity(d[0][1:].flatten(1), raw[0][1:].flatten(1)).round(decimals=4).tolist()))==1

def test_width_default_radius():
    l,ws = made(plain_net())
    w = calm(width, l, ws[:1], n=2, n_dirs=1, n_train=1, n_valid=1)
    assert w.radii[-1]==pytest.approx(_norm(read_weights(l, ws[0], ''))/2) and list(w.values[VL])==['W1']

# ---- statistics

def test_fresh_statistics_matter():
    l,ws = made()
    p = calm(plane, l, ws, n=3)
    stale = np.array([[direct(l, p.weights(x,y), refresh=False)[VL] for x in p.xs] for y in p.ys])
    fresh = np.array([[direct(l, p.weights(x,y))[VL] for x in p.xs] for y in p.ys])
    assert abs(stale-fresh).max()>.05                                # 20 seeds: .65 to 1.34
    np.testing.assert_allclose(p.values[VL], fresh, atol=1e-4)

def test_frozen_layers_keep_their_statistics():
    l = learner(); fit(l, 2)
    for i in (1,4): l.model[i].requires_grad_(False)
    l.add_cb(BnFreeze())
    ws = [jitter(l.model, i) for i in range(3)]
    p = calm(plane, l, ws, n=3)
    for j,i in ((0,0),(1,2)): assert p.values[VL][j,i]==pytest.approx(direct(l, p.weights(p.xs[i],p.ys[j]), refresh=False)[VL], abs=1e-4)

def test_without_batchnorm_there_is_no_pass_for_it():
    for model,passes in ((plain_net(),2),(net(),3)):
        l,ws = made(model)
        n = []
        h = model.register_forward_pre_hook(lambda *a: n.append(1))
        calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1, n_train=40, n_valid=64)
        h.remove()
        assert len(n)==2*passes

def test_training_batches_are_the_augmented_ones():
    l,ws = made()
    plain = calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1)
    l.dls.train.after_batch = lambda b: (b[0]*torch.rand(len(b[0]),1,1,1),b[1])
    aug = calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1)
    assert abs(aug.values[TR]-plain.values[TR]).max()>.01 and abs(aug.values[VL]-plain.values[VL]).max()>1e-3     # the second through the statistics; 20 seeds: .37 to .58, .04 to .42
    again = calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1)
    assert (aug.values[TR]==again.values[TR]).all()          # random streams are put back, so the same batches come again

# ---- nothing happens to the learner

def fingerprint(l):
    opt = str([(h,) for h in l.opt.hypers]),[s.clone() for st in l.opt.state.values() for s in st.values() if isinstance(s, torch.Tensor)]
    rec = list(map(list, l.recorder.values)),list(map(float, l.recorder.losses))
    grads = [None if p.grad is None else p.grad.clone() for p in l.model.parameters()]
    return state(l.model),[m.training for m in l.model.modules()],[p.data_ptr() for p in l.model.parameters()],rng_fingerprint(l),opt,rec,grads,dict(vars(l)),list(l.cbs)

def unchanged(a, b):
    def eq(x, y):
        if isinstance(x, torch.Tensor): return torch.equal(x, y)
        if isinstance(x, dict): return x.keys()==y.keys() and all(x[k] is y[k] or eq(x[k],y[k]) for k in x)
        if isinstance(x, (list,tuple)): return len(x)==len(y) and all(eq(p,q) for p,q in zip(x,y))
        return x is y or x==y
    return all(eq(x,y) for x,y in zip(a,b))

draws = [lambda l,ws: plane(l, ws, n=3), lambda l,ws: ray(l, ws[0], None, n=3), lambda l,ws: width(l, ws[:2], n=2, n_dirs=2)]

@pytest.mark.parametrize('draw', draws, ids=['plane','ray','width'])
def test_learner_untouched(draw):
    l,ws = made(net(.3))
    l.model[1].eval()                                     # odd modes come back too
    given = [{k:v.clone() for k,v in w.items()} for w in ws]
    with l.no_bar(): was = fingerprint(l); draw(l, ws); assert unchanged(was, fingerprint(l))
    assert all(same(a,b) for a,b in zip(ws,given))        # nor to the weights given

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize('at', [1,3,7,20])
def test_learner_untouched_after_an_error(exc, at):
    l,ws = made()
    n = []
    def stop(*a):
        n.append(1)
        if len(n)==at: raise exc('stop')
    with l.no_bar():
        was = fingerprint(l)
        h = l.model[-1].register_forward_hook(stop)
        with pytest.raises(exc): plane(l, ws, n=3)
        h.remove()
        assert len(n)==at and unchanged(was, fingerprint(l))

def test_training_goes_on_the_same():
    a,ws = made()
    b,_ = made()
    calm(plane, a, ws, n=3)
    fit(a, 1); fit(b, 1)
    assert same(state(a.model), state(b.model))

def test_inside_a_fit_and_after_an_interrupted_one():
    res = []
    class Draw(Callback):
        order = 80
        def after_epoch(self):
            res.append(ray(self.learn, ws[0], ws[1], n=3))
    class Press(Callback):
        def after_batch(self):
            if self.learn.epoch==1: raise KeyboardInterrupt
    ws = [jitter(net(), i) for i in range(2)]
    a,b,spy,spy2 = learner(),learner(),Spy(),Spy()
    fit(a, 2, cbs=[Draw(),spy]); fit(b, 2, cbs=spy2)
    assert len(res)==2 and len(spy.ws)==len(spy2.ws)==10 and all(same(x,y) for x,y in zip(spy.ws,spy2.ws)) and same(state(a.model), state(b.model))
    with pytest.raises(KeyboardInterrupt): fit(a, 2, cbs=Press())
    r = calm(ray, a, ws[0], ws[1], n=3)
    assert close(r.at['to'], direct(a, {k:ws[1][k] for k,_ in a.model.named_parameters()}))

@pytest.mark.parametrize('draw', [lambda *a, **kw: plane(*a, n=3, **kw), lambda l,ws,**kw: ray(l, *ws[:2], n=3, **kw),
                                  lambda *a, **kw: width(*a, n=2, n_dirs=1, **kw)], ids=['plane','ray','width'])
@pytest.mark.parametrize('inner', [True,False])
def test_who_draws_in_a_fit_says_so(draw, inner):
    "inner=True: the callbacks of the fit are not set up, and dismantled, a second time"
    seen,(_,ws) = [],made(plain_net())
    class Shapes(Callback):
        heard = 0
        def before_fit(self): self.heard += 1
        def after_fit(self): self.heard += 1
        def before_batch(self): pass                       # without it the pass would leave this callback out
    class Draw(Callback):
        def after_epoch(self):
            was = shapes.heard
            draw(self.learn, ws, inner=inner)
            seen.append(shapes.heard-was)
    shapes = Shapes()
    fit(learner(plain_net()), 1, cbs=[shapes, Draw()])
    assert seen==[0 if inner else 2]

class Rude(nn.Module):
    "Changes its input in place, and a buffer whenever it is called"
    def __init__(self): super().__init__(); self.net = net(); self.register_buffer('calls', torch.zeros(1))
    def forward(self, x): self.calls += 1; x *= 2; return self.net(x)

def test_models_that_change_things():
    l,ws = made(Rude())
    calls = l.model.calls.item()
    r = calm(ray, l, ws[0], ws[1], n=4)
    assert l.model.calls.item()==calls and l.model.calls.item()>0
    other = learner(net())
    strip = lambda w: {k[4:]:v for k,v in w.items() if k.startswith('net.')}
    other.dls.train.after_batch = other.dls.valid.after_batch = lambda b: (b[0]*2,b[1])
    for d,o in zip(l.dls, other.dls): o.rng.setstate(d.rng.getstate())
    ref = calm(ray, other, strip(ws[0]), strip(ws[1]), n=4)
    for h in (VL,VE): np.testing.assert_allclose(r.values[h], ref.values[h], rtol=1e-3)

# ---- sets of weights

def test_everything_that_is_a_set_of_weights(tmp_path):
    swa = SWA(start=0, cycle_len=1)
    l = learner(path=tmp_path); fit(l, 3, cbs=swa)
    avg,other = WeightAverage(l.model),deepcopy(l.model)
    avg.update(l.model)
    l.save('here'); l.save('bare', with_opt=False); swa.save(tmp_path/'swa.pth')
    torch.save(l.model.state_dict(), tmp_path/'sd.pt')
    want = [p.detach().clone() for p in l.model.parameters()]
    swa.restore(l); own = weights(l.model)
    assert not same(own, want)
    for o in (swa, avg, other, other.state_dict(), dict(other.named_parameters()), learner(other), 'here', 'bare', tmp_path/'swa.pth', str(tmp_path/'sd.pt'), avg.state_dict(),
              {'model':other.state_dict(),'opt':{}}, torch.nn.DataParallel(other)):
        assert same(read_weights(l, o, 'W'), want)
    for o in (None, l, l.model): assert same(read_weights(l, o, 'W'), own)
    assert not {p.data_ptr() for p in l.model.parameters()}&{p.data_ptr() for p in read_weights(l, None, 'W')}      # copies
    half = {k:v.half() if v.is_floating_point() else v for k,v in other.state_dict().items()}
    assert {o.dtype for o in read_weights(l, half, 'W')}=={torch.float32}
    swa.apply(l); assert same(read_weights(l, swa, 'W'), want)

def test_half_precision_and_integers():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.net = plain_net().bfloat16(); self.k = nn.Parameter(torch.tensor([3]), requires_grad=False)
        def forward(self, x): return self.net(x.bfloat16()).float()*(self.k==3)
    l = learner(M(), opt_func=sgd)
    ws = [jitter(l.model.net, i) for i in range(2)]
    ws = [{**{f'net.{k}':v for k,v in w.items()}, 'k':torch.tensor([9])} for w in ws]
    r = calm(ray, l, *ws, n=3)
    assert 'k' not in r.weights(.5) and r.weights(.5)['net.1.weight'].dtype==torch.float32 and l.model.k.item()==3
    m = deepcopy(l.model); m.load_state_dict({k:v for k,v in r.weights(.5).items()}, strict=False)
    b = l.dls.valid
    loss = sum(nn.functional.cross_entropy(m(x),y).item()*len(y) for x,y in b)/100
    assert r.values[VL][list(r.ts).index(.5)]==pytest.approx(loss, abs=1e-4)

def test_errors_about_weights(tmp_path):
    l,(a,b,c) = made(path=tmp_path)
    cases = [(plain_net(), 'W2 is of another architecture.*has no 0.weight'), ({k:v for k,v in b.items() if k!='8.bias'}, r'W2 .* it has no 8.bias \(1 of 10'),
             ({**b, '9.weight':torch.ones(2)}, 'the model has no 9.weight'), ({**b, '8.bias':torch.ones(3)}, r'W2: 8.bias has the shape \(3,\), .* \(10,\)'),
             ({**b, '8.bias':torch.full((10,), math.nan)}, 'W2 has weights that are not finite'), (WeightAverage(l.model), 'W2: nothing has been averaged'),
             (SWA(), 'W2: nothing has been averaged'), ('nowhere', 'no such file: neither nowhere nor .*nowhere.pth'), (a, 'W1 and W2 are the same'),
             (c, 'W2 and W3 are the same'), ({k:(a[k]+c[k])/2 for k in a}, 'W1, W2, W3 are on one line.*plot_ray')]
    for w,msg in cases:
        with pytest.raises(ValueError, match=msg): plane(l, [a,w,c])
    for w in (3, [1,2], {'a':1}):
        with pytest.raises(TypeError, match='W2: a set of weights is'): plane(l, [a,w,c])
    with pytest.raises(ValueError, match='three sets of weights, not 2'): plane(l, [a,b])
    for w in (a, 3, None):
        with pytest.raises(TypeError, match='give three sets of weights, as a list or as a dict'): plane(l, w)
        with pytest.raises(TypeError, match='give some sets of weights'): width(l, w)
    with pytest.raises(ValueError, match='at least one'): width(l, {})
    with pytest.raises(ValueError, match="'mean' is what"): plane(l, dict(mean=a, b=b, c=c))
    with pytest.raises(ValueError, match='from and to are the same'): ray(l, a, a)
    with pytest.raises(ValueError, match='SWA is of another'): ray(l, a, plain_net(), names=('SGD','SWA'))

def test_errors_about_arguments():
    l,(a,b,c) = made(plain_net())
    ws = [a,b,c]
    n = []
    h = l.model.register_forward_hook(lambda *_: n.append(1))
    for f,exc,msg in [(lambda: plane(l, ws, n=2), ValueError, 'n=2: give 3 or more'), (lambda: plane(l, ws, n=5.), TypeError, 'n=5.0: give a whole number'),
        (lambda: plane(l, ws, n=None), TypeError, 'n=None'), (lambda: plane(l, ws, margin=-1), ValueError, 'margin=-1: give a finite number, 0 or more'),
        (lambda: plane(l, ws, margin='a'), TypeError, "margin='a': give a number"), (lambda: plane(l, ws, metric='f1'), ValueError, r"metric='f1' .* \['accuracy'\]"),
        (lambda: plane(l, ws, n_train=0), ValueError, 'n_train=0: give 1 or more, or None'), (lambda: plane(l, ws, n_valid=1.5), TypeError, 'n_valid=1.5'),
        (lambda: plane(l, ws, n_train=True), TypeError, 'n_train=True'), (lambda: ray(l, a, b, names='ab'), ValueError, 'two different names'),
        (lambda: ray(l, a, b, names=('a','a')), ValueError, 'two different names'), (lambda: ray(l, a, b, lo=.1), ValueError, 'lo=0.1, hi=1.5: the line goes through both'),
        (lambda: ray(l, a, b, hi=.9), ValueError, 'hi=0.9'), (lambda: ray(l, a, b, hi=math.inf), ValueError, 'hi=inf: give a finite'), (lambda: ray(l, a, b, n=1), ValueError, 'n=1'),
        (lambda: width(l, ws, radius=0), ValueError, 'radius=0'), (lambda: width(l, ws, radius=-1), ValueError, 'radius=-1'), (lambda: width(l, ws, n=1), ValueError, 'n=1: give 2'),
        (lambda: width(l, ws, n_dirs=0), ValueError, 'n_dirs=0: give 1'), (lambda: width(l, ws, seed='a'), TypeError, "seed='a'")]:
        with pytest.raises(exc, match=msg): f()
    assert not n                                # all of them before any work
    h.remove()
    p = calm(plane, l, ws, n=3)
    for f,msg in [(lambda: p.plot(panels='loss'), 'panels=.*choose among'), (lambda: p.plot(panels=[]), 'panels=.*choose'), (lambda: p.plot(top={'loss':1}), 'top=.*choose among'),
                  (lambda: p.plot(top={VL:0.}), 'top=0.0 is not above the lowest value')]:
        with pytest.raises(ValueError, match=msg): f()
    with pytest.raises(TypeError, match='give 2 coordinates, not 1'): p.weights(1.)

def test_one_process_only(monkeypatch):
    l,ws = made(plain_net())
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RuntimeError, match='one process'): plane(l, ws)

def test_empty_loaders():
    l,ws = made(plain_net())
    l.dls.train.n = 3; l.dls.train.drop_last = True
    with pytest.raises(ValueError, match='training DataLoader gave no batch'): plane(l, ws)
    l,ws = made(plain_net())
    l.dls = DataLoaders(l.dls.train)
    p = calm(plot_plane, l, ws, n=3)
    assert list(p.values)==[TR] and len(p.fig.axes)==1

# ---- options

def test_metrics():
    def kind(metrics, metric=None):
        seed()                                                 # the same network each time
        l,ws = made(plain_net(), metrics=metrics)
        r = calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1, metric=metric)
        return {h:v[0] for h,v in list(r.values.items())[2:]}
    acc = kind(accuracy)[VE]
    assert 0<acc<=100 and kind(error_rate)[VE]==pytest.approx(acc)
    def half(o, y): return torch.tensor(.5)
    def top_k_accuracy_of_mine(o, y): return torch.tensor(.75)
    both = [half, accuracy, top_k_accuracy_of_mine, ValueMetric(lambda: 3., 'mine')]
    assert kind(both)=={'validation half':.5} and kind(both, 'accuracy')=={VE:pytest.approx(acc)}
    assert kind(both, 'top_k_accuracy_of_mine')=={'validation 1 - top_k_accuracy_of_mine, %':25}
    assert kind(both, False)=={} and kind(None)=={} and kind([both[-1]])=={}
    with pytest.raises(ValueError, match='choose among'): kind(both, 'mine')

def test_metric_objects_are_not_used_up():
    l,ws = made(plain_net())
    before = l.metrics[0]
    before.reset()
    calm(ray, l, ws[0], ws[1], n=2)
    assert l.metrics[0] is before and before.count==0

def test_subsets():
    bs = [(torch.full((10,1),float(i)),torch.arange(10)) for i in range(12)]
    pick = lambda n,spread: [int(b[0][0]) for b in keep_batches(bs, n, spread)]
    assert pick(None,True)==pick(None,False)==pick(999,True)==list(range(12)) and pick(25,False)==[0,1,2] and pick(10,False)==[0]
    assert pick(40,True)==[2,5,8,11] and pick(1,True)==[11] and pick(50,True)==sorted(set(pick(50,True))) and len(pick(50,True))==5
    l,ws = made()
    n = []
    h = l.model.register_forward_pre_hook(lambda m,x: n.append(len(x[0])))
    for n_train,n_valid,want in ((1,1,[40,40,36]), (41,64,[80,80,36]), (None,65,[200,200,64,36])):
        n.clear(); r = calm(ray, l, ws[0], ws[1], n=2, lo=0, hi=1, n_train=n_train, n_valid=n_valid)
        assert n==want*2
        assert close(r.at['from'], direct(l, {k:ws[0][k] for k,_ in l.model.named_parameters()}, n_train, n_valid))
    h.remove()

def test_joined_batches():
    b = lambda n,*s,dtype=torch.float: (torch.rand(n,*s).to(dtype),torch.arange(n))
    sizes = lambda bs: [len(o[0]) for o in join_batches(bs)]
    assert sizes([b(3,2),b(3,2),b(1,2)])==[7] and sizes([b(3,2),b(3,4),b(2,4)])==[3,5] and sizes([b(2,1),b(2,1,dtype=torch.int)])==[2,2]
    assert sizes([b(2,2**18),b(2,2**18),b(2,2**18)])==[4,2]
    odd = [({'x':torch.ones(2)},torch.ones(2)), torch.ones(2,2), (torch.ones(2,1),torch.tensor(1.)), (torch.ones(2,1),torch.ones(3))]
    for o in odd: assert len(join_batches([o,o]))==2
    x,y = join_batches([b(2,3),b(1,3)])[0]
    assert isinstance(join_batches([list(b(2,3))]*2)[0], list) and y.tolist()==[0,1,0]
    a = join_batches([(TensorImage(torch.ones(2,3)),TensorCategory(torch.ones(2)))]*2)[0]
    assert type(a[0]) is TensorImage and a[0].shape==(4,3)

def test_bar(monkeypatch):
    shown = []
    class Bar:
        def __init__(self, *args): self.args = args; shown.append(self); self.n = []
        def update(self, i): self.n.append(i)
        def close(self): self.n.append('closed')
    monkeypatch.setattr(L_, 'LateBar', Bar)
    l,ws = made(plain_net())
    assert hasattr(l, 'progress')
    p = plane(l, ws, n=3, n_train=1, n_valid=1)
    total = p.values[VL].size+4
    assert shown[0].args[:2]==(total,True) and shown[0].args[3]=='loss surface' and shown[0].n==[*range(1,total+1),'closed']
    calm(ray, l, ws[0], ws[1], n=4, lo=0, hi=1); calm(width, l, ws, n=3, n_dirs=2)
    assert [o.args[:2] for o in shown[1:]]==[(4,False),(15,False)] and all(o.n[-2:]==[o.args[0],'closed'] for o in shown)
    monkeypatch.setattr(L_, 'LateBar', Bar)
    shown.clear()
    l,ws = made()
    ray(l, ws[0], ws[1], n=2, lo=0, hi=1)
    assert [o.args[1] for o in shown]==[True,False,False]        # no bars for the statistics within ours
    assert l.create_mbar is True

# ---- pictures

def shades(fig, ax, places):
    "Colours that the picture has at places in data coordinates"
    fig.canvas.draw()
    buf = np.asarray(fig.canvas.buffer_rgba())
    return [buf[int(round(buf.shape[0]-y)),int(round(x))][:3]/255 for x,y in ax.transData.transform(places)]

def in_bands(*ks): return [(-.6*r,-.8*r) for r in (2.5**.5*(k+.5)/11 for k in ks)]     # of the picture below: halfway between two levels, clear of the markers

def bowl(hole=None):
    xs = ys = np.linspace(-2, 2, 41)
    z = 1+xs[None]**2+ys[:,None]**2
    if hole is not None: z[(abs(xs[None]-1.5)<.3)&(abs(ys[:,None]-1.5)<.3)] = hole
    points = dict(a=(-1.,0.), b=(1.,0.), c=(0.,1.), mean=(0.,1/3))
    return Plane(xs, ys, {VL:z, 'validation r2':z}, points, {k:{VL:1+x*x+y*y, 'validation r2':1+x*x+y*y} for k,(x,y) in points.items()}, ({},{},{}))

@pytest.mark.parametrize('hole', [math.nan, math.inf, -math.inf])
def test_what_is_drawn_is_what_was_measured(hole):
    p = bowl(hole)
    fig = p.plot(VL)
    ax = fig.axes[0]
    levels = np.array(ax.collections[0].levels)
    np.testing.assert_allclose(levels, 1+2.5*np.linspace(0,1,12)**2)        # the points lie 1 above the minimum
    cmap,norm = plt.get_cmap('viridis'),BoundaryNorm(levels, 256, extend='max')
    places = in_bands(1, 4, 7, 9)
    for (x,y),c in zip(places, shades(fig, ax, places)):
        z = 1+x*x+y*y
        np.testing.assert_allclose(c, cmap(norm(z))[:3], atol=.02)
    for c in shades(fig, ax, [(1.5,1.5),(-1.9,-1.9)]): np.testing.assert_allclose(c, cmap(norm(99))[:3], atol=.02)     # the hole, and what is above all levels
    assert ax.get_aspect()==1 and ax.get_title()==VL and ax.get_xlabel()==ax.get_ylabel()=='distance in weight space'

def test_dark_is_low_in_grey_too():
    fig = bowl().plot(VL)
    grey = [c@[.299,.587,.114] for c in shades(fig, fig.axes[0], [*in_bands(*range(11)),(-1.9,1.9)])]
    assert grey==sorted(grey) and grey[-1]-grey[0]>.5

def test_plot_options():
    p = bowl()
    fig = p.plot()
    assert fig is p.fig and len(fig.axes)==2 and [o.get_title() for o in fig.axes[:2]]==[VL,'validation r2']
    np.testing.assert_allclose(np.diff(fig.axes[1].collections[0].levels), 8/11)      # who knows which end is the good one
    fig = p.plot([VL], top={VL:2.}, cmap='cividis')
    cs = fig.axes[0].collections[0]
    assert cs.levels[-1]==2 and cs.cmap.name=='cividis'

def test_what_cannot_be_drawn_is_said():
    l,ws = made(plain_net())
    l.dls = DataLoaders(l.dls.train)
    assert list(calm(ray, l, ws[0], ws[1], n=2, n_train=1).values)==[TR]
    with pytest.raises(ValueError, match='no validation data'): ray(l, ws[0], ws[1], n=2, metric='accuracy')
    with pytest.raises(TypeError, match='a dict of heading: value'): bowl().plot(top=1)

def test_axes_of_ones_own():
    l,ws = made(plain_net())
    kw = dict(n_train=1, n_valid=1)
    p,r,w = calm(plane, l, ws, n=3, **kw),calm(ray, l, ws[0], ws[1], n=2, **kw),calm(width, l, ws[:2], n=2, n_dirs=1, **kw)
    fig,axs = plt.subplots(1, 4)
    for o,ax in zip((p,r,w),axs): assert o.plot(VL, axs=ax) is fig and ax.get_xlabel() and (ax.lines or ax.collections)
    assert not axs[3].lines and not axs[3].collections
    p.plot([TR,VL], axs=axs[2:])
    assert [o.get_title() for o in axs[2:]]==[TR,VL]
    for o in p,r,w:
        with pytest.raises(ValueError, match='axs: give one for each panel'): o.plot([TR,VL], axs=axs[0])

def test_levels_of_odd_values():
    z = np.full((3,3), .5)
    assert (np.diff(_levels(z, [.5], None, True))>0).all() and (np.diff(_levels(z*math.nan, [math.nan], None, True))>0).all()
    assert _levels(np.array([[0,1.]]), [9.], None, True)[-1]==1        # no level above all values
    p = bowl()
    p.values = {VL:p.values[VL]*math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        p.plot()
        p.values = {VL:np.ones((41,41))}
        p.plot()

def test_plot_functions_pass_on_what_they_get():
    l,ws = made(plain_net())
    kw = dict(metric=False, n_train=1, n_valid=1)
    p = calm(plot_plane, l, ws, n=3, margin=.1, panels=VL, cmap='cividis', **kw)
    assert list(p.values)==[TR,VL] and len(p.fig.axes)==1 and p.fig.axes[0].collections[0].cmap.name=='cividis' and np.allclose(p.xs, calm(plane, l, ws, n=3, margin=.1, **kw).xs)
    r = calm(plot_ray, l, ws[0], ws[1], ('a','b'), -.1, 1.1, 3, panels=[VL], **kw)
    assert len(r.fig.axes)==1 and r.ts.tolist()==pytest.approx([-.1,0,.6-.1,1,1.1]) and list(r.at)==['a','b']
    w = calm(plot_width, l, ws, 2., 3, 2, True, 5, panels=VL, **kw)
    assert len(w.fig.axes)==1 and w.filterwise and w.radii.tolist()==[0,1,2]
    ref = calm(width, l, ws, 2., 3, 2, True, 5, **kw)
    assert all((w.values[VL][k]==ref.values[VL][k]).all() for k in w.values[VL])

@pytest.mark.parametrize('draw', [lambda l,ws: plot_plane(l, ws, n=3), lambda l,ws: plot_ray(l, ws[0], ws[1], n=3), lambda l,ws: plot_width(l, ws[:1], n=2, n_dirs=1)])
def test_values_that_are_not_finite(draw):
    l,ws = made()
    class Blow(Callback):
        order,run_valid = 40,True
        def after_loss(self):
            if self.learn.model[-1].bias[0]>ws[0]['8.bias'][0]+1e-4: self.learn.loss_grad = self.learn.loss = self.learn.loss*math.inf
    l.add_cb(Blow())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with l.no_bar(): res = draw(l, ws)
        res.fig.canvas.draw(); repr(res)
    vals = np.concatenate([np.ravel(v if not isinstance(v, dict) else list(v.values())) for v in res.values.values()])
    assert np.isfinite(vals).any()

def test_weights_far_out_do_not_warn():
    l,ws = made()
    huge = {k:v*1e15 if v.is_floating_point() else v for k,v in ws[1].items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not np.isfinite(calm(plot_ray, l, ws[0], huge, n=3).values[VL]).all()

# ---- any learner

class Two(nn.Module):
    "Two inputs, two outputs"
    def __init__(self): super().__init__(); self.a,self.b,self.bn = nn.Linear(3,4),nn.Linear(2,4),nn.BatchNorm1d(4)
    def forward(self, x, z): h = self.bn(self.a(x)+self.b(z)); return h[:,:2],h[:,2:]

def two(tmp_path):
    items = [(torch.randn(3),torch.randn(2),torch.tensor(i%2),torch.randn(2)) for i in range(40)]
    dls = DataLoaders(*[FastaiDataLoader(items, bs=8, shuffle=s) for s in (True,False)])
    dls.n_inp = 2
    return Learner(dls, Two(), loss_func=lambda o,y,t: nn.functional.cross_entropy(o[0],y)+(o[1]-t).pow(2).mean(), metrics=None),None

def language(tmp_path):
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_lm_config, language_model_learner
    df = pd.DataFrame(dict(text=[' '.join(np.random.choice('a film with great bad plot and more'.split(), 30)) for _ in range(40)]))
    dls = TextDataLoaders.from_df(df, path=tmp_path, text_col='text', is_lm=True, valid_pct=.25, bs=4, seq_len=8, seed=1)
    cfg = {**awd_lstm_lm_config, 'emb_sz':12, 'n_hid':16, 'n_layers':2}
    return language_model_learner(dls, AWD_LSTM, config=cfg, pretrained=False, path=tmp_path, metrics=accuracy),None

def test_recurrent_networks_keep_their_batches(tmp_path):
    seed()
    l,_ = language(tmp_path)
    ns = []
    h = l.model.register_forward_pre_hook(lambda m,x: ns.append(len(x[0])))
    calm(ray, l, None, jitter(l.model, 0), n=2, lo=0, hi=1, n_train=12, n_valid=4)
    h.remove()
    assert ns==[4]*8                    # three of training and one of validation, at two places: a state goes from one to the next

def mixed(tmp_path): return learner(cbs=[MixedPrecision(), MixUp()]),None
def pictures(tmp_path): return Learner(vision(tmp_path)[0].dls, nn.Sequential(ConvLayer(3,4,stride=2), ConvLayer(4,4), nn.Flatten(), nn.Linear(4*16*16,10)), metrics=accuracy),None
def instance_norm(tmp_path): return learner(nn.Sequential(nn.Conv2d(1,2,1), nn.InstanceNorm2d(2, affine=True), nn.Flatten(), nn.Linear(128,10)), metrics=[]),None

@pytest.mark.parametrize('make', [pictures, tabular, text, torch_loaders, language, two, mixed, instance_norm])
def test_any_learner(make, tmp_path):
    seed()
    l,_ = make(tmp_path)
    with l.no_bar(), l.no_logging():
        l.fit(1)
        ws = [jitter(l.model, i, .1) for i in range(2)]
        own,want,n_valid = state(l.model),l.validate(),1 if trained_layers(l) else None
        modes = [m.training for m in l.model.modules()]
        rng = rng_fingerprint(l)
        r = plot_ray(l, ws[0], None, ('a','now'), n=2, lo=0, hi=1, n_train=8, n_valid=n_valid)
        assert same(state(l.model), own) and rng_fingerprint(l)==rng and [m.training for m in l.model.modules()]==modes
        if not trained_layers(l): assert r.at['now'][VL]==pytest.approx(want[0], rel=1e-4)
        w = width(l, [None], n=2, n_dirs=1, n_train=8, n_valid=n_valid)
        for h,v in w.values.items(): assert v['W1'][0,0]==pytest.approx(r.at['now'][h], rel=1e-4) and np.isfinite([*r.values[h], v['W1'][0,1]]).all()
        assert r.at['a'][VL]!=r.at['now'][VL]
    assert len(r.values)==(3 if len(l.metrics) else 2)

# ---- Ctrl-C

def lines_of(f, press=None):
    "The module of each line of fastswa that `f()` runs, Ctrl-C coming at one of them, and whether it ended in KeyboardInterrupt"
    seen = []
    def trace(frame, event, arg):
        if event=='line':
            seen.append(frame.f_globals['__name__'])
            if len(seen)==press: signal.raise_signal(signal.SIGINT)
        return trace
    own = lambda frame, event, arg: trace if frame.f_globals.get('__name__','').startswith('fastswa.') else None
    sys.settrace(own)
    try: f()
    except KeyboardInterrupt: return seen,True
    finally: sys.settrace(None)
    return seen,False

pictures = dict(plane=lambda l,ws: plane(l, ws, n=3, margin=0, n_train=1, n_valid=1), ray=lambda l,ws: ray(l, *ws[:2], n=2, lo=0, hi=1, n_train=1, n_valid=1),
                width=lambda l,ws: width(l, ws[:2], n=2, n_dirs=1, n_train=1, n_valid=1))

@pytest.mark.parametrize('name', pictures)
def test_ctrl_c_at_any_line(name):
    l,ws = made()
    l.remove_cb(l.progress)
    def now():
        plain = {k:v for k,v in vars(l).items() if k not in ('model','cbs')}
        return [*plain.items(), *state(l.model).items()],[m.training for m in l.model.modules()],[len(m._forward_hooks)+len(m._forward_pre_hooks) for m in l.model.modules()],list(l.cbs)
    def same_as(was):
        (a,*more),(b,*others) = was,now()
        return more==others and all(j==k and (torch.equal(v,w) if isinstance(v, torch.Tensor) else v is w) for (j,v),(k,w) in zip(a, b, strict=True))
    f = lambda: pictures[name](l, ws)
    f()                                                        # what is made once is there
    was,rng,handler = now(),rng_fingerprint(l),signal.getsignal(signal.SIGINT)
    seen,came = lines_of(f)
    assert len(seen)>500 and not came
    some = np.linspace(1, len(seen), 5, dtype=int)
    ends = [i for i,o in enumerate(seen, 1) if o=='fastswa.batchnorm'][-16:]       # where the learner is put back
    for k in [*some, *ends] if name!='plane' else ends[::4]:
        assert lines_of(f, k)[1], f'line {k} of {len(seen)}: lost'
        assert same_as(was) and rng_fingerprint(l)==rng and signal.getsignal(signal.SIGINT) is handler, f'line {k} of {len(seen)}'

def test_ctrl_c_ends_after_the_place():
    l,ws = made()
    n = []
    def press(*args):
        n.append(1)
        signal.raise_signal(signal.SIGINT)
    h = l.model.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt): calm(plane, l, ws, n=19)
    h.remove()
    assert len(n)<10                                           # not all of the 361 places

# ---- what a person sees

@pytest.mark.parametrize('f,own', [(plot_plane,'panels top cmap axs'), (plot_ray,'panels axs'), (plot_width,'panels axs')])
def test_parameters_on_shift_tab(f, own):
    "Those of the measurement, with the same defaults, and those of the picture"
    measured = inspect.signature(globals()[f.__name__.removeprefix('plot_')]).parameters
    shown = inspect.signature(f).parameters
    assert list(shown)==[*measured, *own.split()] and all(shown[k].default==o.default for k,o in measured.items())

def boxes(artists): return [o.get_window_extent() for o in artists]

def test_names_of_a_ray_cover_nothing():
    ts = np.linspace(-.5, 1.5, 9)
    for names in ('from','to'),('SGD, 60 epochs','SWA, the average of 16'):
        at = {k:{TR:1.,VL:2.} for k in names}
        fig = Ray(names, ts, 6.3, {TR:1-(ts-.5)**2, VL:ts**2}, at, ()).plot()
        fig.canvas.draw()
        for ax in fig.axes:
            assert 'from' not in ax.get_xlabel()
            *texts,plot = boxes([*ax.texts, ax.patch])
            assert not any(o.overlaps(plot) for o in texts) and not texts[0].overlaps(texts[1])
            assert all(o.x0>=0 and o.x1<=fig.bbox.x1 and o.y1<=fig.bbox.y1 for o in texts)

@pytest.mark.parametrize('columns,rows', [(19,19), (19,4), (6,19)])
def test_the_colour_bar_is_as_tall_as_the_plot(columns, rows):
    xs,ys = np.arange(columns)*1.,np.arange(rows)*1.
    z = (xs-2)**2+(ys[:,None]-2)**2
    points = dict(W1=(0,0), W2=(xs[-1],0), W3=(xs[-1],ys[-1]), mean=(xs.mean(),ys.mean()))
    for axs in None,plt.subplots(2, 2)[1][0,0]:
        fig = Plane(xs, ys, {VL:z}, points, {k:{VL:1.} for k in points}, ()).plot(axs=axs)
        fig.canvas.draw()
        ax = fig.axes[0]
        bar, = ax.child_axes
        plot,side,*texts = boxes([ax.patch, bar.patch, *ax.texts])
        assert abs(plot.y0-side.y0)<1 and -1<plot.y1-side.y1<.06*plot.height and 0<side.x0-plot.x1<30      # the rest is its arrow
        ticks = boxes(o for o in bar.get_yticklabels() if o.get_text())
        assert len(ticks)>1 and not any(a.overlaps(b) for a,b in zip(ticks, ticks[1:]))
        if plot.width>150: assert all(plot.x0<=o.x0 and o.x1<=plot.x1 for o in texts)         # names stay inside
        if axs is None: assert 0<=ticks[0].x0 and ticks[0].x1<=fig.bbox.x1
