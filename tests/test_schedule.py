"Promise 2, the paper's formulas, and the proportions of parameter groups"
import inspect
from fractions import Fraction

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from common import Spy, fit, learner, two_groups
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedExp, SchedLin, combined_cos
from hypothesis import given, settings, strategies as st
from fastswa.schedule import draw_sched, fit_positions, group_lrs, plot_swa_sched, sched_authors, swa_cycles, swa_lrs

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

starts = st.one_of(st.floats(0,.95), st.integers(0,5))
lens   = st.one_of(st.none(), st.floats(.01,3))

@settings(max_examples=300, deadline=None)
@given(st.integers(1,30), st.integers(1,60), starts, lens)
def test_cycles_end_with_the_fit(n_epoch, n_iter, start, cycle_len):
    total = n_epoch*n_iter
    try: cyc = swa_cycles(n_epoch, n_iter, start, cycle_len)
    except ValueError as e:
        assert cycle_len is not None and 'cycle_len' in str(e)
        return
    if not cyc.ends:
        assert isinstance(start, int) and start>=n_epoch
        return
    assert cyc.ends[-1]==total                                  # the last cycle isn't cut off
    assert all(isinstance(o, int) for o in cyc.ends)
    gaps = np.diff([cyc.begin,*cyc.ends])
    assert gaps.min()>=1
    if isinstance(start, int): assert cyc.begin==start*n_iter   # an int start is kept
    else:                      assert cyc.begin>=int(start*total+1e-9)-1 and np.ptp(gaps)<=1
    assert np.ptp(gaps[1:])<=1 if len(gaps)>1 else True         # equal within rounding
    c = max(1, cycle_len*n_iter) if cycle_len else None
    if c: assert all(abs(g-c)<=1 for g in gaps[1:]) and gaps[0]>=c-1 and (isinstance(start, float) or gaps[0]<2*c+1)
    pos = [cyc.pos(i) for i in range(total)]
    assert [i+1 for i,p in enumerate(pos) if p==1]==list(cyc.ends)
    assert all((p is None)==(i<cyc.begin) for i,p in enumerate(pos))

@pytest.mark.parametrize('n_epoch', [1,2,3,5,8,30,39])
def test_automatic_cycles_average_at_least_ten(n_epoch): assert len(swa_cycles(n_epoch, 50).ends)>=10

@pytest.mark.parametrize('args,ends', [((10,10,.75,1), (90,100)), ((10,10,.7,1), (80,90,100)), ((10,10,5,2), (80,100)), ((4,10,.5,.25), (22,25,27,30,32,35,37,40))])   # 2.5 iterations a cycle, rounded one by one
def test_examples(args, ends):
    assert swa_cycles(*args).ends==ends

def test_long_run_has_no_drift():
    cyc = swa_cycles(1000, 997, 0, 1/3)
    assert cyc.ends[-1]==1000*997 and max(abs(e-(k+1)*997/3) for k,e in enumerate(cyc.ends))<=.5

def test_papers_formula_at_every_iteration():
    n_epoch,n_iter,a1,a2 = 9,7,.1,.004
    lrs,cyc = swa_lrs(n_epoch, n_iter, lr=.2, swa_lr=a2, swa_lr_max=a1, start=3, cycle_len=2)
    c = 2*n_iter
    assert cyc.begin==21
    for i in range(1, n_epoch*n_iter-21+1):
        t = ((i-1)%c+1)/c
        assert lrs[21+i-1]==pytest.approx((1-t)*a1+t*a2, abs=1e-12)

@pytest.mark.parametrize('sched', [SchedCos, SchedExp, SchedLin, lambda s,e: lambda pos: s if pos<1 else e])
def test_any_shape(sched):
    lrs,cyc = swa_lrs(4, 10, lr=.2, swa_lr=.01, swa_lr_max=.1, start=2, cycle_len=1, sched=sched)
    np.testing.assert_allclose(lrs[[29,39]], .01)
    np.testing.assert_allclose(lrs[20:30], [sched(.1,.01)((i+1)/10) for i in range(10)])

def test_default_is_half_of_the_highest():
    lrs,_ = swa_lrs(10, 10, lr=SchedCos(.1,.001))
    np.testing.assert_allclose(lrs[75:], .05)
    lrs,_ = swa_lrs(10, 10, lr=SchedCos(.1,.001), swa_lr=False)
    np.testing.assert_allclose(lrs, [SchedCos(.1,.001)(i/100) for i in range(100)])

@given(st.lists(st.floats(1e-6,1.), min_size=1, max_size=5), st.floats(1e-6,1.))
def test_numbers_keep_proportions(peaks, lr):
    got = group_lrs(lr, peaks)
    np.testing.assert_allclose(got/np.array(peaks), lr/max(peaks), rtol=1e-9)
    np.testing.assert_allclose(group_lrs(None, peaks), np.array(peaks)/2)

def test_slices_are_fastais():
    from fastai.optimizer import SGD
    import torch
    opt = SGD([[torch.nn.Parameter(torch.zeros(1))] for _ in range(3)], lr=1.)
    for s in (slice(1e-4,1e-2), slice(1e-2)):
        opt.set_hyper('lr', s)
        np.testing.assert_allclose(group_lrs(s, [1,1,1]), [h['lr'] for h in opt.hypers])

def test_zero_rates(): np.testing.assert_allclose(group_lrs(.1, [0,0]), [.1,.1]); np.testing.assert_allclose(group_lrs(.1, [0,1]), [0,.1])

@pytest.mark.parametrize('kw,exc,msg', [(dict(start=1.), ValueError, 'start=1'), (dict(start=-1), ValueError, 'negative'), (dict(start='a'), TypeError, '0.75'),
    (dict(start=True), TypeError, 'True'), (dict(start=float('nan')), TypeError, 'nan'), (dict(cycle_len=0), ValueError, 'positive'),
    (dict(cycle_len=-1.), ValueError, 'positive'), (dict(cycle_len='x'), TypeError, 'epochs'), (dict(start=3,cycle_len=2), ValueError, 'cycle_len<=1')])
def test_messages(kw, exc, msg):
    with pytest.raises(exc, match=msg): swa_cycles(4, 10, **kw)

@pytest.mark.parametrize('lr,exc', [('x',TypeError), (True,TypeError), (-1,ValueError), ([.1,-1],ValueError), ([],TypeError), (float('nan'),TypeError), (slice(1e-3,None),TypeError), ([.1,.1],ValueError)])
def test_bad_rates(lr, exc):
    with pytest.raises(exc): group_lrs(lr, [.1,.1,.1])

def test_authors_recipe():
    f = sched_authors(np.array([.1,.2]), np.array([.05,.1]), .8)
    np.testing.assert_allclose(f(.2), [.1,.2]); np.testing.assert_allclose(f(.56), [.075,.15]); np.testing.assert_allclose(f(.73), [.05,.1])
    for e in range(200):   # train.py of the authors: schedule(epoch), swa_start=160
        t = e/160
        fac = 1 if t<=.5 else 1-(1-.5)*(t-.5)/.4 if t<=.9 else .5
        np.testing.assert_allclose(f(e/200)[0], .1*fac)

def test_picture_shows_what_is_computed():
    ax = plot_swa_sched(6, lr=.1, swa_lr=.01, swa_lr_max=.05, start=2, cycle_len=2, n_iter=10)
    line,dots = ax.lines
    lrs,cyc = swa_lrs(6, 10, .1, .01, 2, 2, .05)
    y = line.get_ydata()
    np.testing.assert_allclose(y[~np.isnan(y)], lrs)
    np.testing.assert_allclose(dots.get_xdata(), [4,6]); np.testing.assert_allclose(dots.get_ydata(), [.01,.01])
    assert ax.get_xlabel()=='epoch' and ax.get_ylabel()=='learning rate'
    ax = draw_sched(lrs[:45], cyc)                               # a fit that was stopped early
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [4])

# Numbers of other types

@pytest.mark.parametrize('kind', [Fraction, np.array, np.float64, torch.tensor], ids=['Fraction', 'array', 'float64', 'tensor'])
def test_any_number_counts_as_its_float(kind):
    assert swa_cycles(10, 100, kind(.75), kind(.5))==swa_cycles(10, 100, .75, .5)
    assert all(type(o) is int for o in swa_cycles(10, 100, kind(.75), kind(.5)).ends)
    rate = kind(.25)
    for lr,plain in (rate,.25),([rate]*3,[.25]*3),(slice(rate, kind(.5)),slice(.25,.5)),(slice(rate),slice(.25)):
        got = group_lrs(lr, [rate,.5,1])
        assert got.dtype==float and got.tolist()==group_lrs(plain, [.25,.5,1]).tolist()
    kw = dict(lr=.5, swa_lr=.125, swa_lr_max=.25, start=.5, cycle_len=1.5)
    lrs,cyc = swa_lrs(6, 10, **{k:kind(v) for k,v in kw.items()})
    want,cycles = swa_lrs(6, 10, **kw)
    assert lrs.dtype==float and lrs.tolist()==want.tolist() and cyc==cycles

@pytest.mark.parametrize('kind', [np.array, np.int64, torch.tensor], ids=['array', 'int64', 'tensor'])
def test_any_whole_number_is_a_number_of_epochs(kind):
    assert swa_cycles(10, 100, kind(5), kind(2))==swa_cycles(10, 100, 5, 2)
    with pytest.raises(ValueError, match='cannot be negative'): swa_cycles(10, 100, kind(-1))

@pytest.mark.parametrize('start', [np.ones(2), torch.ones(1), np.array('a'), np.array(True), None], ids=repr)
def test_not_a_number(start):
    with pytest.raises(TypeError, match='start must be'): swa_cycles(4, 10, start)
    with pytest.raises(TypeError, match='swa_lr must be'): group_lrs([start]*3, [.1]*3)

def test_a_whole_learning_rate_is_not_rounded():
    lrs,_ = swa_lrs(4, 2, lr=1)
    assert lrs.tolist()==[1]*6+[.5]*2

# Positions in a fit

@pytest.mark.parametrize('n_epoch,bs', [(3,15), (7,18), (1,23), (6,100)])
def test_positions_are_fastais_to_the_bit(n_epoch, bs):
    seen,spy = [],Spy()
    class Position(Callback):
        order,run_valid = ParamScheduler.order+1,False
        def before_batch(self): seen.append(self.pct_train)
    learn = learner(bs=bs, splitter=two_groups)
    fit(learn, n_epoch, slice(.01,.1), method='fit_one_cycle', cbs=[Position(), spy])
    n_iter = len(learn.dls.train)
    pos = fit_positions(n_epoch, n_iter)
    assert pos==seen
    sched = combined_cos(.25, np.array([.01,.1])/25, np.array([.01,.1]), np.array([.01,.1])/1e5)
    assert [sched(p).tolist() for p in pos]==spy.lrs
    for upto in 0,1,n_iter,n_iter+1,n_epoch*n_iter,n_epoch*n_iter+5: assert fit_positions(n_epoch, n_iter, upto)==pos[:upto]
    assert fit_positions(0, n_iter)==fit_positions(n_epoch, 0)==[]

# What a person sees

def test_a_picture_of_nothing_says_so():
    ax = plot_swa_sched(10, lr=.1, start=20)
    assert ax.get_title()=='Nothing would be averaged: start=20 leaves none of 10 epochs'
    assert len(ax.lines[1].get_xdata())==0 and ax.get_legend() is None
    fig = ax.figure
    fig.canvas.draw()
    box = ax.title.get_window_extent()
    assert 0<=box.x0 and box.x1<=fig.bbox.x1
    assert plot_swa_sched(10, lr=.1, start=9).get_title()==''

def test_parameters_of_the_picture_are_those_of_the_schedule():
    shown,wanted = (inspect.signature(o).parameters for o in (plot_swa_sched, swa_lrs))
    assert {k:o.default for k,o in shown.items()}=={**{k:o.default for k,o in wanted.items()}, 'ax':None}
    with pytest.raises(TypeError, match='strat'): plot_swa_sched(10, strat=2)
