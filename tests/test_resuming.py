"`Resume`: a fit that is killed goes on to the bit, whatever it is made of"
import os, signal, time, warnings

import pytest, torch
from common import *
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper, ranger
from fastai.text.models.core import SequentialRNN
from fastswa import resume
from fastswa.callback import SWA
from fastswa.ema import EMA
from fastswa.ensemble import FGE, SnapshotEnsemble
from fastswa.lawa import LAWA
from fastswa.progress import FitProgress
from fastswa.resume import Every, Resume, StopSignals
from fastswa.snapshots import Snapshots
from fastswa.swag import SWAG

pytestmark = pytest.mark.filterwarnings('ignore:Saved file doesn', 'ignore:the average is worse')

class Dies(Callback):
    "Raises at the n-th event of a kind, after all others have heard of it, or before"
    def __init__(self, event, n, order=20_000): self.event,self.order,self.left = event,order,iter(range(n-1))
    def __call__(self, event):
        super().__call__(event)
        if event!=self.event or self.learn.lock.locked(): return
        if next(self.left, None) is None: raise KeyboardInterrupt            # an iterator: what `Resume` cannot put back

def make(other=0, **kw):
    "A learner with dropout, two groups and, if `other`, other weights and streams: nothing of the result may come from it"
    l = learner(net(.3), **{'splitter':two_groups, **kw})
    if other:
        seed(other)
        for m in l.model.modules():
            if hasattr(m, 'reset_parameters'): m.reset_parameters()
        for dl in l.dls.loaders: dl.rng = random.Random(other)
    return l

def outcome(l, cbs):
    rec = l.recorder
    res = dict(model=state(l.model), rows=[[*map(float, o)] for o in rec.values], losses=[float(o) for o in rec.losses], lrs=rec.lrs, iters=rec.iters,
               streams=rng_fingerprint(l), hypers=[dict(o) for o in l.opt.hypers], collected=[getattr(cb, 'collected', None) for cb in cbs])
    for cb in cbs:
        if hasattr(cb, 'store'): res['members'] = {f'{k} {n}':v for k in range(cb.n_members) for n,v in cb.store[k]['state'].items()}
        if getattr(cb, 'n_averaged', 0): res[cb.prefix] = cb.state_dict()['average'] if hasattr(cb, 'state_dict') else {}
    return res

def differing(a, b): return [k for k in a if not (same(a[k], b[k]) if isinstance(a[k], dict) else str(a[k])==str(b[k]))]

def run(folder, *cbs, n=4, method='fit', kill=None, other=0, every=1, args=(), **kw):
    "One life of a run; what came of it if it wasn't killed"
    l = make(other, **kw)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: fit(l, n, *args, method=method, cbs=[*cbs, *([] if folder is None else [Resume(folder, every)]), *([Dies(*kill)] if kill else [])])
        except KeyboardInterrupt: return None
    assert kill is None, 'it was not killed'
    return outcome(l, cbs)

def check_history(folder, cbs, kills, **kw):
    "Unbroken, with files written; killed again and again, gone on with by learners of other seeds; and started once more"
    whole = run(None, *cbs(), **kw)
    for i,kill in enumerate(kills): assert run(folder, *cbs(), kill=kill, other=i and 7+i, **kw) is None
    assert differing(whole, run(folder, *cbs(), other=5, **kw))==[]
    assert differing(whole, run(folder, *cbs(), other=6, **kw))==[]

ends,batches = [('after_epoch',2),('after_epoch',1)],[('after_batch',9),('after_batch',12)]
swa = lambda **kw: [SWA(**{**dict(start=.3, cycle_len=.4, check=False), **kw})]
def tracked(): return [*swa(eval_every=1), SaveModelCallback(monitor='swa_loss'), EarlyStoppingCallback(patience=2), ReduceLROnPlateau(patience=1)]

@pytest.mark.parametrize('cbs,kills,kw', [
    (list, ends, {}), (swa, ends, dict(method='fit_one_cycle')), (swa, batches, dict(method='fit_one_cycle', every='1it')),
    (lambda: swa(eval_every=1), [('after_batch',14),('after_validate',1)], dict(every=.5)), (lambda: swa(eval_every=1), [('after_fit',1,-20)], {}),
    (lambda: swa(swa_lr=False), ends, dict(method='fit_flat_cos')), (swa, [('after_epoch',2),('after_batch',3)], dict(method='fine_tune', n=2)),
    (swa, [('before_validate',3),('after_epoch',1)], dict(method='fine_tune', n=3)), (list, ends, dict(method='fit_sgdr', n=2, args=(2,))),
    (lambda: [SWA(start='auto')], ends, dict(method='fit_one_cycle', n=5)), (lambda: [SWA(start='auto')], batches, dict(every='2it', n=5)),
    (lambda: [EMA(), LAWA(2, install=False), Snapshots(every=.3)], batches, dict(every='3it')), (lambda: [SWAG(2)], ends, {}),
    (lambda: [FGE(start=.2)], batches, dict(every='2it')), (lambda: [SnapshotEnsemble(2, bn_batches=None)], ends, {}),
    (lambda: [Snapshots(every=.4, keep=3, keep_on='disk')], batches, dict(every='2it')),
    (tracked, ends, dict(n=6)), (tracked, batches, dict(every='1it', n=6)),
    (lambda: [GradientAccumulation(96), MixUp(), *swa()], ends, {}), (lambda: [GradientAccumulation(96), MixUp(), *swa()], batches, dict(every='2it')),
    (swa, [('after_epoch',2),('after_batch',8)], dict(every='3it', workers=2)), (swa, batches, dict(every='2it', opt_func=Adam)),
    (swa, ends, dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))), (swa, ends, dict(opt_func=ranger)),
    (lambda: swa(eval_every=1), [('after_epoch',1,-20_000),('before_train',1)], {})])
def test_to_the_bit(cbs, kills, kw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_history(tmp_path/'run', cbs, kills, **kw)

# ---- each of the things that are put back is needed, and would be missed

@pytest.mark.parametrize('part,kw,missed', [('set_weights', {}, 'model'), ('set_streams', {}, 'model'), ('set_counts', {}, 'rows'),
    ('announce_averages', {}, 'collected'), ('set_averages', dict(every='2it'), 'model'), ('_set_opt', {}, 'model')])
def test_what_is_forgotten_is_missed(part, kw, missed, tmp_path, monkeypatch):
    kill = ('after_batch',16) if kw else ('after_epoch',3)
    whole = run(None, *swa(), **kw)
    run(tmp_path, *swa(), kill=kill, **kw)
    monkeypatch.setattr(FitProgress, part, lambda self, saved: None)
    try: res = run(tmp_path, *swa(), other=5, **kw)
    except Exception: return                                       # no less
    assert missed in differing(whole, res)

def test_gradients_that_wait_for_more_are_kept(tmp_path, monkeypatch):
    cbs = lambda: [GradientAccumulation(120)]                      # three batches of five: some wait at each end
    whole = run(None, *cbs())
    run(tmp_path, *cbs(), kill=ends[0])
    monkeypatch.setattr('fastswa.progress._set_grad', lambda p,g: None)
    assert 'model' in differing(whole, run(tmp_path, *cbs(), other=5))

# ---- nothing is changed by it, and nothing trained twice

@pytest.mark.parametrize('kw', [{}, dict(every='1it')])
def test_the_walk_is_the_one_without_it(kw, tmp_path):
    assert differing(run(None, *swa(eval_every=1)), run(tmp_path, *swa(eval_every=1), **kw))==[]

class Counts(Callback):
    "Events that it hears of"
    order,run_valid = 0,False
    def __init__(self): self.heard = []
    def before_epoch(self): self.heard.append(('epoch',self.learn.epoch))
    def after_batch(self): self.heard.append((self.learn.epoch,self.learn.iter))

def test_others_sleep_while_epochs_and_batches_are_skipped(tmp_path):
    run(tmp_path, kill=('after_batch',12), every='1it')
    seen = Counts()
    run(tmp_path, seen, every='1it')
    assert seen.heard[-8:]==[(2,3),(2,4),('epoch',3),*((3,i) for i in range(5))] and len(seen.heard)<=9+12     # those of before come back
    l,seen = make(),Counts()
    fit(l, 4, cbs=[seen, Resume(tmp_path)])
    assert not [o for o in seen.heard[len(l.recorder.losses)+4:]]

def test_says_where_it_goes_on(tmp_path, capsys):
    run(tmp_path, kill=('after_batch',13), every='1it')
    def said():
        capsys.readouterr()
        with make(3).no_bar() as l: l.fit(4, cbs=Resume(tmp_path))
        return capsys.readouterr().out
    with pytest.warns(UserWarning, match='other weights'): first = said()
    assert first.startswith('Resume: goes on after 1 of 4 epochs and 4 batches\n')
    assert [int(o[1:2]) for o in first.splitlines() if o[0]=='[']==[0,1,2,3]                          # the whole table
    with pytest.warns(UserWarning, match='other weights'): assert 'was over, its result is in the model' in said()

# ---- another run's files

@pytest.mark.parametrize('kw,said', [(dict(args=(.05,)), 'learning rate: [0.1, 0.1] there, [0.05, 0.05] here'), (dict(n=3), 'n_epoch: 4 there, 3 here'),
    (dict(opt_func=Adam), 'optimizer'), (dict(method='fit_one_cycle'), 'schedule: none there, lr and mom here'), (dict(splitter=trainable_params), 'parameter groups')])
def test_another_run_is_refused_with_what_differs(kw, said, tmp_path):
    run(tmp_path, kill=ends[0])
    l = make(**{k:v for k,v in kw.items() if k in ('bs','opt_func','splitter')})
    was = state(l.model)
    with pytest.raises(ValueError) as e: fit(l, kw.get('n', 4), *kw.get('args', ()), method=kw.get('method', 'fit'), cbs=Resume(tmp_path))
    assert said in str(e.value) and f'fresh=True' in str(e.value) and str(tmp_path) in str(e.value) and same(was, state(l.model))

def test_another_architecture_and_other_averages(tmp_path):
    run(tmp_path, kill=ends[0])
    other = make()
    other.model[8] = nn.Linear(64, 11)
    with pytest.raises(ValueError, match=r'model: 8.weight is \(10, 64\) there, \(11, 64\) here'): fit(other, 4, cbs=Resume(tmp_path))
    with pytest.raises(ValueError, match='averages'): fit(make(), 4, cbs=[SWA(), Resume(tmp_path)])

def test_other_versions_and_weights_are_told_of(tmp_path, monkeypatch):
    run(tmp_path, kill=ends[0])
    monkeypatch.setattr('fastswa.__version__', '0')
    with pytest.warns(UserWarning, match="version of fastswa.*fresh=True"): fit(make(3), 4, cbs=Resume(tmp_path))

def test_fresh_begins_anew(tmp_path):
    run(tmp_path, kill=ends[0])
    l = fit(make(), 3, .3, cbs=Resume(tmp_path, fresh=True))
    assert len(l.recorder.values)==3 and len(list(tmp_path.glob('*.pt')))==2

def test_refused_by_what_comes_first_in_a_run_of_two_fits(tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(make(), 3, method='fine_tune', cbs=[Resume(tmp_path), Dies('after_epoch', 3)])
    with pytest.raises(ValueError, match='n_epoch: 1 there, 2 here'): fit(make(), 3, freeze_epochs=2, method='fine_tune', cbs=Resume(tmp_path))

# ---- one object, several fits

def test_one_object_for_several_fits(tmp_path):
    def both(kill=None, other=0):
        l,r = make(other),Resume(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for n in 2,3:
                try: fit(l, n, cbs=[*swa(), r, *([Dies(*kill)] if kill and n==3 else [])])
                except KeyboardInterrupt: return
        return state(l.model)
    l = make()
    for n in 2,3: fit(l, n, cbs=swa())
    assert both(kill=('after_epoch',2)) is None and same(both(other=4), state(l.model))

def test_the_cell_again_after_ctrl_c(tmp_path):
    "The same learner and the same object"
    whole,l,r = run(None, *swa()),make(),Resume(tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[*(cbs:=swa()), r, Dies('after_batch', 13)])
    handler = signal.getsignal(signal.SIGINT)
    assert handler is signal.default_int_handler and r.learn is None
    fit(l, 4, cbs=[*cbs, r])
    assert differing(whole, outcome(l, cbs))==[]

def test_two_of_them_or_one_twice():
    with pytest.raises(ValueError, match='two Resume'): fit(make(), 1, cbs=[Resume('a'), Resume('b')])
    r = Resume('a')
    with pytest.raises(ValueError, match='attached to the learner already'): fit(make(cbs=r), 1, cbs=r)

# ---- logs

@pytest.mark.parametrize('append', [False,True])
def test_the_log_is_that_of_an_unbroken_run(append, tmp_path):
    def rows(): return [o.rsplit(',', 1)[0] for o in (tmp_path/'h.csv').read_text().splitlines()]      # without the time
    log = lambda: [CSVLogger('h.csv', append=append)]
    (tmp_path/'h.csv').write_text('earlier,\n')
    run(None, *log(), path=tmp_path)
    whole = rows()
    (tmp_path/'h.csv').write_text('earlier,\n')
    for kill in ('after_epoch',2),('after_batch',8),None: run(tmp_path/'run', *log(), kill=kill, path=tmp_path)
    assert rows()==whole and len(whole)==5+append

def test_a_log_is_not_touched_where_the_run_is_another_one(tmp_path):
    log = lambda: CSVLogger('h.csv', append=True)
    (tmp_path/'h.csv').write_text('earlier,\n')
    run(tmp_path/'run', log(), path=tmp_path, kill=ends[0])
    was = (tmp_path/'h.csv').read_text()
    with pytest.raises(ValueError, match='learning rate'): fit(make(path=tmp_path), 4, .3, cbs=[log(), Resume(tmp_path/'run')])
    assert (tmp_path/'h.csv').read_text()==was and len(was.splitlines())>2

def test_a_refused_fit_leaves_the_folder_to_others(tmp_path):
    run(tmp_path, kill=ends[0])
    for o in tmp_path.glob('*.pt'): o.write_bytes(b'nothing')
    with pytest.raises(ValueError) as e: fit(make(), 4, cbs=Resume(tmp_path))
    with pytest.raises(ValueError, match='fresh=True'): fit(make(), 4, cbs=Resume(tmp_path))
    del e
    fit(make(), 1, cbs=Resume(tmp_path, fresh=True))

def test_metrics_of_training_within_an_epoch(tmp_path):
    def rows(*cbs):
        l = make()
        l.recorder.train_metrics = True
        fit(l, 2, cbs=cbs)
        return [list(o) for o in l.recorder.values]
    whole = rows()
    with pytest.raises(KeyboardInterrupt): rows(Resume(tmp_path, '1it'), Dies('after_batch', 3))
    assert rows(Resume(tmp_path, '1it'))==whole

def test_an_option_that_was_changed_counts(tmp_path):
    "What a callback was given is the script's business; what it has counted is the run's"
    stop = lambda p: [EarlyStoppingCallback(min_delta=10, patience=p)]
    run(tmp_path, *stop(3), n=8, kill=('after_epoch',2))
    res = run(tmp_path, *stop(5), n=8)
    assert len(res['rows'])==6

# ---- the folder

def test_a_folder_that_cannot_be_written_is_told_of_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='is a file'): Resume(tmp_path/'file')
    monkeypatch.setattr('fastswa.checkpoint.write_file', lambda *a,**k: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    seen = Counts()
    with pytest.raises(ValueError, match='No space left.*make room'): fit(make(), 2, cbs=[seen, Resume(tmp_path)])
    assert not [o for o in seen.heard if o[0]!='epoch']

def test_a_disk_that_fills_up_ends_no_training(tmp_path, monkeypatch):
    from fastswa import checkpoint
    real,n = checkpoint.write_file,[0]
    def full(*args, **kw):
        n[0] += 1
        if n[0] in (3,4): raise OSError(28, 'No space left on device')
        return real(*args, **kw)
    monkeypatch.setattr(checkpoint, 'write_file', full)
    with pytest.warns(UserWarning, match='could not be written.*the training goes on'): l = fit(make(), 4, cbs=Resume(tmp_path))
    assert len(l.recorder.values)==4

def test_the_last_ones_stay(tmp_path):
    fit(make(), 4, cbs=Resume(tmp_path, keep=3))
    assert len(list(tmp_path.glob('*.pt')))==3

def test_a_damaged_file_falls_back_on_the_one_before(tmp_path):
    whole = run(None)
    run(tmp_path, kill=('after_epoch',3))
    newest = max(tmp_path.glob('*.pt'))
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.warns(UserWarning, match=newest.name): l = fit(make(), 4, cbs=Resume(tmp_path))
    assert differing(whole, outcome(l, ()))==[]

# ---- how often

@pytest.mark.parametrize('every,n', [(1,5), (2,4), (.5,9), ('2it',13), ('1h',3)])
def test_every(every, n, tmp_path, monkeypatch):
    "The beginning, the last epoch and the end are there in any case"
    from fastswa import checkpoint
    real,written = checkpoint.write_file,[]
    monkeypatch.setattr(checkpoint, 'write_file', lambda *a,**k: written.append(0) or real(*a, **k))
    fit(make(), 4, cbs=Resume(tmp_path, every))
    at_epochs = {1:4, 2:2, .5:4, '2it':4, '1h':1}[every]
    assert len(written)==2+at_epochs+{.5:8, '2it':8}.get(every, 0)

def test_by_the_clock(monkeypatch):
    e,now = Every('10min'),[0.]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    e.written()
    seen = []
    for now[0] in 599,600,601:
        seen.append((e.within(1, 5), e.after(1)))
        if seen[-1][0]: e.written()
    assert seen==[(False,False),(True,True),(False,False)]

@pytest.mark.parametrize('kw,error', [(dict(every=0), ValueError), (dict(every=1.5), ValueError), (dict(every='soon'), ValueError), (dict(every='0min'), ValueError),
    (dict(every=None), TypeError), (dict(every=True), TypeError), (dict(keep=0), ValueError), (dict(keep='all'), TypeError), (dict(fresh=1), TypeError), (dict(path=3), TypeError)])
def test_bad_arguments(kw, error):
    with pytest.raises(error): Resume(**{'path':'run', **kw})

# ---- signals

def in_child(f):
    "The exit status of a forked process that runs `f`"
    pid = os.fork()
    if pid==0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            f()
            os._exit(0)
        except KeyboardInterrupt: os._exit(130)
        except BaseException: os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

class Signals(Callback):
    "Sends signals to this process"
    def __init__(self, sig, event, n, times=1): self.event,self.heard,self.sent = event,iter(range(1, n+1)),[sig]*times
    def __call__(self, event):
        super().__call__(event)
        if event==self.event and next(self.heard, None) is not None and not self.heard.__length_hint__():
            for o in self.sent: os.kill(os.getpid(), o)

@pytest.mark.parametrize('sig,code', [(signal.SIGTERM,-15), (signal.SIGINT,130)])
@pytest.mark.parametrize('event,n,at', [('after_pred',8,(1,1)), ('after_pred',6,(0,'validation')), ('before_validate',2,(1,'validation')), ('after_epoch',2,(2,None)), ('before_epoch',3,(2,1))])
def test_a_signal_waits_for_the_step_and_the_file(sig, code, event, n, at, tmp_path):
    "`after_pred` counts batches of validation, too: five of training and two of validation in an epoch"
    whole = run(None, *swa(eval_every=1))
    sent = Signals(sig, event, n)
    assert in_child(lambda: run_to_end(tmp_path, sent))==code
    saved = resume.RunFolder(tmp_path).read()
    assert (saved['epoch'],saved['position'])==at
    assert differing(whole, run(tmp_path, *swa(eval_every=1), other=5))==[]

def run_to_end(folder, *more, every=1):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(make(), 4, cbs=[*swa(eval_every=1), Resume(folder, every), *more])

def test_a_second_signal_is_obeyed_at_once(tmp_path):
    late = Counts()
    def life():
        try: run_to_end(tmp_path, Signals(signal.SIGINT, 'before_batch', 8, times=2), late)
        except KeyboardInterrupt: os._exit(len([o for o in late.heard if o[0]!='epoch']))
    assert in_child(life)==5                                       # before the batch was over
    assert resume.RunFolder(tmp_path).read()['epoch']==1

def test_handlers_are_as_before(tmp_path):
    was = [signal.getsignal(o) for o in StopSignals.kinds]
    fit(make(), 1, cbs=Resume(tmp_path/'a'))
    with pytest.raises(KeyboardInterrupt): fit(make(), 1, cbs=[Resume(tmp_path/'b'), Dies('after_batch', 2)])
    with pytest.raises(ValueError): fit(make(), 1, .3, cbs=[Resume(tmp_path/'a')])
    assert [signal.getsignal(o) for o in StopSignals.kinds]==was

# ---- not a fit

def test_what_is_no_fit_writes_nothing(tmp_path):
    l = make(cbs=Resume(tmp_path/'run'))
    with quiet(l):
        l.validate()
        l.get_preds()
    assert not (tmp_path/'run').exists()

def test_a_validation_within_the_fit(tmp_path):
    class Looks(Callback):
        order = 100
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.validate()
    whole = run(None, Looks(), *swa())
    run(tmp_path, Looks(), *swa(), kill=('after_epoch',3))
    assert differing(whole, run(tmp_path, Looks(), *swa(), other=5))==[]

# ---- what may change

def test_a_fit_at_a_constant_rate_may_become_longer(tmp_path):
    whole = run(None, n=6)
    run(tmp_path, n=4)
    with pytest.warns(UserWarning, match='n_epoch: 4 there, 6 here'): l = fit(make(), 6, cbs=Resume(tmp_path))
    assert differing(whole, outcome(l, ()))==[]
    with pytest.raises(ValueError, match='averages'): fit(make(), 8, cbs=[*swa(), Resume(tmp_path)])

def test_one_that_was_ended_early_stays_ended(tmp_path):
    stop = lambda: EarlyStoppingCallback(min_delta=10, patience=1)
    res = run(tmp_path, stop(), n=8)
    assert len(res['rows'])==2 and len(run(tmp_path, stop(), n=9)['rows'])==2

def test_other_batches_from_one_epoch_to_the_next(tmp_path):
    run(tmp_path, kill=('after_epoch',3))
    with pytest.warns(UserWarning, match='batches in an epoch: 5 there, 10 here'): l = fit(make(bs=20), 4, cbs=Resume(tmp_path))
    assert len(l.recorder.losses)==3*5+10
    run(tmp_path/'b', kill=('after_batch',3), every='1it')
    with pytest.raises(ValueError, match='batches in an epoch'): fit(make(bs=20), 4, cbs=Resume(tmp_path/'b'))

class Counting(nn.Module):
    "A loss function with a buffer"
    def __init__(self, n=10):
        super().__init__()
        self.register_buffer('seen', torch.zeros(n))
    def forward(self, p, y):
        self.seen[y] += 1
        return F.cross_entropy(p, y, weight=1/(1+self.seen[:10]))

def test_what_a_loss_function_keeps(tmp_path):
    def life(*cbs, n=10):
        l = make()
        l.loss_func = Counting(n)
        fit(l, 3, cbs=[Resume(tmp_path), *cbs])
        return l.loss_func.seen
    l = make()
    l.loss_func = Counting()
    fit(l, 3)
    with pytest.raises(KeyboardInterrupt): life(Dies('after_epoch', 2))
    with pytest.raises(ValueError, match='loss: seen is'): life(n=11)
    assert torch.equal(life(), l.loss_func.seen)

class Remembers(nn.Module):
    "What it has seen counts in the next batch, as in a recurrent network"
    def __init__(self): super().__init__(); self.seen = None
    def reset(self): self.seen = None
    def forward(self, x):
        last,self.seen = self.seen,x.detach().mean(0)
        return x if last is None else x+last

def test_what_modules_remember_within_an_epoch(tmp_path):
    def life(*cbs):
        seed()
        l = learner(SequentialRNN(nn.Flatten(), nn.Linear(64, 20), Remembers(), nn.Linear(20, 10)), cbs=ModelResetter())
        fit(l, 2, cbs=cbs)
        return [float(o) for o in l.recorder.losses]
    whole = life()
    with pytest.raises(KeyboardInterrupt): life(Resume(tmp_path, '1it'), Dies('after_batch', 3))
    assert life(Resume(tmp_path, '1it'))==whole

def test_lazy_layers(tmp_path):
    def lazy(): return learner(nn.Sequential(nn.Flatten(), nn.LazyLinear(20), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10)))
    whole = fit(lazy(), 3)
    with pytest.raises(KeyboardInterrupt): fit(lazy(), 3, cbs=[Resume(tmp_path), Dies('after_epoch', 2)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert same(state(whole.model), state(fit(lazy(), 3, cbs=Resume(tmp_path)).model))

def test_another_number_of_processes(tmp_path, monkeypatch):
    run(tmp_path, kill=ends[0])
    monkeypatch.setattr(resume, 'world_size', lambda: 2)
    with pytest.raises(ValueError, match='processes: 1 there, 2 here'): fit(make(), 4, cbs=Resume(tmp_path))

def test_persistent_workers_are_told_of(tmp_path):
    l = make()
    l.dls.loaders[0] = FastaiDataLoader(list(zip(X[:80], Y[:80])), bs=40, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match='persistent_workers'): fit(l, 1, cbs=Resume(tmp_path))
