"Late or unclear failures of the callback, and what a person is told"
import gc, math, os, pickle, random, signal, sys, warnings, weakref
from fractions import Fraction

import pytest, torch
from common import *
from fastswa import callback, compare, cycle, model_average
from fastswa.callback import SWA
from fastswa.cycle import Helper

def helpers(learn): return [cb for cb in learn.cbs if isinstance(cb, Helper)]
def told(f, match=''):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f()
    return [w for w in ws if match in str(w.message)]

# ---- attached, passed, removed

@pytest.mark.parametrize('attached', [True,False])
def test_passed_twice_is_refused_and_nobody_is_left_behind(attached):
    swa,other = SWA(),CSVLogger()
    l = learner(cbs=swa if attached else None)
    with quiet(l):
        before = list(l.cbs)
        with pytest.raises(ValueError, match='do not pass it to fit as well'): l.fit(1, cbs=[other, swa] if attached else [other, swa, swa])
        assert sorted(map(id, l.cbs))==sorted(map(id, before)) and other.learn is None
    if attached:
        assert len(helpers(l))==2 and swa.learn is l
        fit(l, 2)
        assert swa.n_averaged and l.swa is swa
    else: assert swa.learn is None

def test_helpers_that_somebody_takes_and_puts_back_are_no_orphans():
    for cbs in (lambda l: list(l.cbs), lambda l: [l.swa, *helpers(l)], lambda l: [*helpers(l), l.swa]):
        l,swa = learner(),SWA()
        l.add_cb(swa)
        with l.removed_cbs(cbs(l)): pass
        fit(l, 2)
        assert swa.n_averaged and len(helpers(l))<=4
        l.remove_cb(swa)
        assert not helpers(l)
        fit(l, 2)                                              # and nothing crashes
    l,swa = learner(cbs=SWA()),None
    left = helpers(l)
    l.remove_cb(l.swa)
    l.add_cbs(left)                                            # orphans all the same
    fit(l, 2)

def test_an_interrupt_in_the_frozen_part_of_fine_tune_lets_the_learner_go():
    class Stop(Callback):
        def before_batch(self): raise KeyboardInterrupt
    swa = SWA()
    def go():
        l = learner(splitter=two_groups)
        try: fit(l, 2, .1, method='fine_tune', cbs=[swa, Stop()])
        except KeyboardInterrupt: pass
        return weakref.ref(l)
    ref = go()
    gc.collect()
    assert ref() is None
    l = learner(splitter=two_groups)                           # and the next fine_tune is as ever
    fit(l, 2, .1, method='fine_tune', cbs=swa)
    assert swa.n_averaged and max(swa.collected)==10

def test_a_tracker_of_the_average_waits_while_validate_is_called(tmp_path):
    for cb in (EarlyStoppingCallback(monitor='swa_loss', patience=3), SaveModelCallback(monitor='swa_loss')):
        l,swa = learner(path=tmp_path, cbs=cb),SWA(eval_every=1)
        l.add_cb(swa)
        with quiet(l): l.validate()
        fit(l, 3)
        with quiet(l): want = l.validate(); l.get_preds()
        assert cb.run
        with quiet(l): assert list(l.validate())==list(want)

# ---- cancelled and short of memory

@pytest.mark.parametrize('exc', [CancelValidException, CancelEpochException, CancelTrainException, CancelFitException, CancelBatchException])
def test_cancels_of_others_before_a_pass_of_ours(exc):
    "A callback that shapes batches, and cancels validations in its own way"
    class Shape(Callback):
        ours = False
        def before_batch(self): self.learn.xb = (self.learn.xb[0]*1.,)
        def before_validate(self):
            if hasattr(self.learn, '_aside'): raise exc()
    l,swa = learner(cbs=Shape()),SWA(eval_every=1)
    assert not told(lambda: fit(l, 4, cbs=swa), 'drop_last')
    cols = np.array(l.recorder.values, dtype=float)[-1][-2:]
    assert np.isfinite(cols).all() and swa._average.weights.is_applied()
    np.testing.assert_allclose(list(_validate(l)), cols, rtol=1e-6)

def _validate(l):
    with quiet(l): return l.validate()

class Greedy(nn.Module):
    "Needs more memory than there is for batches above a size, where BatchNorm is measured (or, `always`, everywhere but in training)"
    def __init__(self, at_most=math.inf): super().__init__(); self.at_most,self.bn = at_most,None
    def forward(self, x):
        if self.bn is not None and self.bn.training and not self.training and len(x)>self.at_most: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
        return x

def greedy(at_most, **kw):
    g,bn = Greedy(at_most),nn.BatchNorm2d(1)
    g.__dict__['bn'] = bn
    return learner(nn.Sequential(g, bn, nn.Flatten(), nn.Linear(64,10)), **kw)

def test_out_of_memory_in_an_evaluation_and_in_the_refresh():
    l,swa = greedy(20),SWA(eval_every=1, start=1, cycle_len=1, check=False)
    ws = told(lambda: fit(l, 4, cbs=swa))
    memory = [w for w in ws if 'out of memory' in str(w.message)]
    assert len(memory)==2 and 'columns stay nan' in str(memory[0].message) and 'batches of 20' in str(memory[1].message)
    assert np.isnan(np.array(l.recorder.values, dtype=float)[:,3:]).all() and len(l.recorder.values)==4
    assert swa.n_averaged==3 and swa._average.weights.is_applied()
    torch.testing.assert_close(l.model[1].running_mean[0], X[:200].mean(), atol=1e-5, rtol=1e-5)

def test_no_memory_at_all_leaves_the_last_weights():
    l,swa,spy = greedy(0),SWA(check=False),Spy()
    ws = told(lambda: fit(l, 3, cbs=[swa, spy]), 'keeps its last weights')
    assert len(ws)==1 and same(weights(l.model), spy.ws[-1]) and swa.n_averaged
    l.model[0].at_most = math.inf                              # memory is free again
    with quiet(l): swa.apply(l)
    torch.testing.assert_close(l.model[1].running_mean[0], X[:200].mean(), atol=1e-5, rtol=1e-5)
    assert swa._average.weights.is_applied()

# ---- Ctrl-C at any line

def lines_run(f):
    "The lines of the callback's module that `f` runs, as (function, line), with Ctrl-C at the k-th of them if asked for"
    def run(k=None):
        seen = []
        def local(frame, event, arg):
            if event=='line':
                seen.append((frame.f_code.co_name, frame.f_lineno))
                if len(seen)==k:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return local
        def trace(frame, event, arg): return local if frame.f_code.co_filename in ours else None
        old = sys.gettrace()
        sys.settrace(trace)
        try: f()
        finally: sys.settrace(old)
        return seen
    return run

ours = {o.__file__ for o in (callback, compare, cycle, model_average)}
careful = ('collect','take','apply','restore','last_of_all','swapped','measure','rebase','compare','compare_average','_try_check',
           '__call__','losses','without_workers')

def test_ctrl_c_at_any_line_of_the_callback():
    def make():
        l = learner(n=800, bs=400)                             # enough of it for the check
        swa,spy = SWA(start=1, cycle_len=1, eval_every=1, check=True),Spy()
        spy.order = SWA.order-1
        def go():
            fit(l, 3, cbs=[swa, spy])
            with quiet(l):
                swa.restore(l)
                swa.apply(l)
                swa.compare(l)
        return l,swa,spy,go
    _,_,whole,go = make()
    seen = lines_run(go)()
    last = {line:k for k,line in enumerate(seen, 1) if line[0] in careful}      # where something might be half-done: each line, the last time;
    last = sorted(last.values())[::int(os.environ.get('FASTSWA_TEST_EVERY', 2))]      # half of them here, and all in .ci/run
    some = random.Random(0).sample(range(1, len(seen)+1), int(os.environ.get('FASTSWA_TEST_LINES', 8)))      # more of the others by hand
    for k in sorted({*last, *some}):
        l,swa,spy,go = make()
        with pytest.raises(KeyboardInterrupt):
            lines_run(go)(k)
            raise KeyboardInterrupt('it came too late for any line')
        if swa.learn is not None: l.remove_cb(swa)              # fastai's own: whoever is being attached just then stays
        assert not helpers(l) and swa.learn is None, k
        assert swa.n_averaged==len(swa.collected), k
        assert all(m.momentum==.1 for m in l.model.modules() if hasattr(m, 'momentum')) and not any(m._forward_hooks or m._forward_pre_hooks for m in l.model.modules()), k
        if swa.n_averaged:
            mean = spy.mean(swa.collected)
            n = len(spy.ws)
            def is_walk(): return any(same(weights(l.model), o) for o in whole.ws[n-1:n+1])      # perhaps a step further, not yet seen
            assert swa._average.weights.is_applied() if swa._average.applied else is_walk(), k
            with quiet(l): swa.apply(l)
            for p,m in zip(l.model.parameters(), mean): torch.testing.assert_close(p.detach().double(), m, atol=1e-6, rtol=1e-6)
            swa.restore(l)
            assert is_walk(), k
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, k

# ---- models of all kinds

def test_awd_lstm_can_be_copied():
    from fastai.text.models import AWD_LSTM, awd_lstm_lm_config, get_language_model
    seed()
    conf = {**awd_lstm_lm_config, 'emb_sz':8, 'n_hid':12, 'n_layers':2}
    ds = list(zip(torch.randint(0,20,(40,6)), torch.randint(0,20,(40,6))))
    data = DataLoaders(FastaiDataLoader(ds, bs=10), FastaiDataLoader(ds, bs=10))
    l = Learner(data, get_language_model(AWD_LSTM, 20, config=conf), loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()], lr=1e-3)
    swa = SWA(); fit(l, 2, cbs=swa)
    m = swa.swa_model
    want,got = dict(l.model.named_parameters()),dict(m.named_parameters())
    assert m is not l.model and list(want)==list(got) and all(torch.equal(v, got[k]) and v.data_ptr()!=got[k].data_ptr() for k,v in want.items())
    m.reset(); l.model.reset(); l.model.eval()
    with torch.no_grad(): torch.testing.assert_close(m(ds[0][0][None])[0], l.model(ds[0][0][None])[0])

def test_an_export_loads_where_fastswa_is_not_installed(tmp_path, monkeypatch):
    from test_callback import image_dls
    l = learner(data=image_dls(), path=tmp_path, cbs=SWA(eval_every=1)); fit(l, 2)
    img = l.dls.train_ds[0][0]
    with l.no_bar(): want = l.predict(img)[2]
    l.export('e.pkl')
    assert l.swa.n_averaged and len(helpers(l))==2             # the learner itself has it still
    for k in [o for o in sys.modules if o.split('.')[0]=='fastswa']: monkeypatch.setitem(sys.modules, k, None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        l = load_learner(tmp_path/'e.pkl')
    with l.no_bar(): torch.testing.assert_close(l.predict(img)[2], want)

def test_a_copy_for_another_process_keeps_the_callback():
    l = learner(cbs=SWA())
    assert isinstance(pickle.loads(pickle.dumps(l)).swa, SWA)  # a learner that is sent elsewhere to be trained there

def test_weights_that_are_rearranged_in_evaluation_mode():
    "As LoRA does, whose factors are merged into the frozen weight in `eval()`"
    class LoRA(nn.Linear):
        def __init__(self, i, o):
            super().__init__(i, o)
            self.a,self.b = nn.Parameter(torch.randn(2,i)),nn.Parameter(torch.randn(o,2)*.1)
            self.weight.requires_grad_(False)
        def train(self, mode=True):
            if mode!=self.training: self.weight.data += (self.b@self.a).data*(-1 if mode else 1)
            return super().train(mode)
        def forward(self, x): return super().forward(x)+(x@self.a.t()@self.b.t() if self.training else 0)
    seed()
    l,swa,spy = learner(nn.Sequential(nn.Flatten(), LoRA(64,32), nn.BatchNorm1d(32), nn.ReLU(), LoRA(32,10)), lr=.02),SWA(eval_every=1),Spy()
    frozen = l.model[1].weight.detach().clone()
    fit(l, 4, cbs=[swa, spy])
    cols = l.recorder.values[-1][-2:]
    np.testing.assert_allclose(list(_validate(l)), cols, rtol=1e-4)
    l.model.train()
    torch.testing.assert_close(l.model[1].weight.detach(), frozen, atol=1e-5, rtol=1e-5)
    mean = spy.mean(swa.collected)
    for p,m in zip(l.model.parameters(), mean): torch.testing.assert_close(p.detach().double(), m, atol=1e-5, rtol=1e-5)
    swa.restore(l)
    l.model.train()
    for p,w in zip(l.model.parameters(), spy.ws[-1]): torch.testing.assert_close(p.detach(), w, atol=1e-5, rtol=1e-5)

def test_a_frozen_mask_of_infinities_is_no_divergence():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = nn.Parameter(torch.tensor([0.]*10+[-math.inf]), requires_grad=False)
            self.lin = nn.Linear(64, 11)
        def forward(self, x): return self.lin(x)+self.mask
    l,swa,spy = learner(nn.Sequential(nn.Flatten(), Masked())),SWA(),Spy()
    assert not told(lambda: fit(l, 3, cbs=[swa, spy]), 'not finite') and swa.n_averaged==4
    assert torch.equal(l.model[1].mask, torch.tensor([0.]*10+[-math.inf]))
    torch.testing.assert_close(l.model[1].lin.weight.detach().double(), torch.stack([spy.ws[i-1][1] for i in swa.collected]).double().mean(0), atol=1e-6, rtol=1e-6)

def test_parameters_outside_of_the_model_are_told_once():
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(1))
        def forward(self, pred, y): return F.cross_entropy(pred*self.scale, y)
    l = learner()
    l.loss_func = Scaled()
    assert not told(lambda: fit(l, 2, cbs=SWA()), 'not in learn.model')             # they do not train
    l.splitter = lambda m: [[*m.parameters(), *l.loss_func.parameters()]]
    assert len(ws:=told(lambda: fit(l, 2, reset_opt=True, cbs=SWA()), 'not in learn.model'))==1 and 'trains 1 parameters' in str(ws[0].message)

def test_lazy_models_with_loaded_weights():
    make = lambda: nn.Sequential(nn.LazyConv2d(4,3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    seed()
    m = make()
    m(X[:2])
    lazy = make()
    lazy.load_state_dict(m.state_dict())
    swa = SWA(eval_every=1)
    l = learner(lazy); fit(l, 3, cbs=swa)
    np.testing.assert_allclose(list(_validate(l)), l.recorder.values[-1][-2:], rtol=1e-6)

# ---- what a person is told

def test_warnings_point_at_the_line_that_called_fit():
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        l = learner()
        with l.no_bar(), l.no_logging(): l.fit(2, cbs=SWA(start=5)); line = sys._getframe().f_lineno
    w = next(w for w in ws if 'never start' in str(w.message))
    assert (w.filename,w.lineno)==(__file__,line)

def test_names_of_other_libraries_are_answered():
    for k,ours in dict(swa_start='start', swa_lrs='swa_lr', swa_epoch_start='start', annealing_epochs='fit_swa', anneal_strategy='sched', swa_freq='cycle_len', avg_fn='equal weights',
                       use_buffers='are measured', swa_eval_freq='eval_every', device='where the weights are').items():
        with pytest.raises(TypeError, match=ours) as e: SWA(**{k:3})
        assert k in str(e.value)
    with pytest.raises(TypeError, match='no parameter foo.* It takes start, swa_lr'): SWA(foo=1)

def test_without_a_learner_and_before_a_fit():
    l,swa = learner(),SWA()
    for f in (swa.apply, swa.restore, swa.compare):
        with pytest.raises(TypeError, match='give it the learner'): f()
        with pytest.raises(RuntimeError, match='pass this SWA to a fit first'): f(l)
    class Stop(Callback):
        def before_epoch(self):
            if self.learn.epoch==1: raise CancelFitException
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(l, 4, cbs=[swa, Stop()])
    for f in (lambda: swa.apply(l), lambda: swa.swa_model):
        with pytest.raises(RuntimeError, match=r'after 5 iterations, the first weights are collected after 16 \(epoch 3.2\)'): f()

def test_a_diverged_fit_does_not_contradict_itself():
    class Diverge(Callback):
        order,run_valid = 54,False
        def after_batch(self): self.learn.model[0].weight.data.fill_(math.nan)
    ws = told(lambda: fit(learner(), 3, cbs=[SWA(), Diverge()]))
    last = str(ws[-1].message)
    assert 'nothing was averaged' in last and 'not finite' in last and 'would have been' not in last

def test_fractions_and_arrays_are_numbers():
    for a,b in [(dict(start=Fraction(1,2)),dict(start=.5)), (dict(start=np.array(1)),dict(start=1)), (dict(swa_lr=np.array(.03), cycle_len=Fraction(2,5)),dict(swa_lr=.03, cycle_len=.4)),
                (dict(swa_lr_max=torch.tensor(.25), eval_every=np.int8(2), bn_batches=np.array(3)),dict(swa_lr_max=.25, eval_every=2, bn_batches=3))]:
        got = []
        for kw in (a,b):
            l,swa = learner(),SWA(**kw, check=False); fit(l, 3, cbs=swa)
            got.append((state(l.model), swa.collected))
        assert same(got[0][0], got[1][0]) and got[0][1]==got[1][1]

def test_help_shows_each_parameter_and_an_example():
    doc = SWA.__doc__
    for k in ('start','swa_lr','cycle_len','swa_lr_max','sched','eval_every','bn_batches','save_to','check'): assert f'    {k}: ' in doc
    assert 'learn.fit(' in doc
