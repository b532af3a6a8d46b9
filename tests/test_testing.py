"The kit finds each fault that it is there to find, and none where there is none"
import os, signal, sys, time

import pytest, torch
from common import *
from fastswa import testing
from fastswa.callback import SWA
from fastswa.ema import EMA
from fastswa.ensemble import SnapshotEnsemble
from fastswa.testing import *
from fastswa.testing import random_streams

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')

def make(p=.3, **kw): return learner(nn.Sequential(nn.Flatten(), nn.Linear(64,12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(p), nn.Linear(12,10)), **kw)
def seeded_make(**kw):
    seed()
    return make(**kw)
def one_fit(learn, cbs): learn.fit(2, cbs=cbs)

# ---- outcomes

@pytest.mark.parametrize('a,b,says', [
    (1., 1., None), (math_nan:=float('nan'), float('nan'), None), (0., -0., '0.0 and -0.0'), (1, 1., '1 and 1.0'), (np.float64(2), 2., None),
    (torch.tensor([math_nan,1]), torch.tensor([math_nan,1]), None), (torch.zeros(2), -torch.zeros(2), '2 of 2 numbers differ, by up to 0'),
    (torch.tensor(1.), torch.tensor(1.5), '1 of 1 numbers differ, by up to 0.5'), (torch.zeros(2), torch.zeros(3), 'float32 [2] and float32 [3]'),
    (torch.zeros(2), torch.zeros(2).half(), 'float16'), (torch.ones(3).bfloat16(), torch.ones(3).bfloat16(), None), (np.arange(3), np.arange(3)+1, '3 of 3 numbers differ, by up to 1'),
    ([1,2,3], [1,5,4], '2 of 3 values differ, the first is number 1: 2 and 5'), ([1], [1,2], '1 and 2 values'), ((1,2), [1,2], None), (L(1,2), [1,2], None),
    (dict(a=1), dict(b=1), 'a: only in the first'), (dict(x=dict(y=[torch.zeros(1)])), dict(x=dict(y=[torch.ones(1)])), 'x y 0: 1 of 1'),
    ('one\ntwo', 'one\nsix', "(lines): 1 of 2 values differ, the first is number 1: 'two' and 'six'"), (None, 0, 'None and 0'), (torch.tensor([True]), torch.tensor([False]), 'by up to 1'),
])
def test_differences(a, b, says):
    got = differences(a, b)
    assert bool(got)==bool(differences(b, a))
    assert got==[] if says is None else says in got[0]

def test_an_outcome_is_a_copy_and_has_everything(tmp_path):
    l,swa,fge,stop = make(path=tmp_path),SWA(eval_every=1, check=False),SnapshotEnsemble(),EarlyStoppingCallback(patience=5)
    walk,log = Walk(),CSVLogger()
    fit(l, 4, cbs=[walk, log, stop, fge])
    fit(l2:=make(path=tmp_path), 4, cbs=[swa, walk2:=Walk()])
    a,b = fit_outcome(l, walk, stop, fge, files=[tmp_path/'history.csv']),fit_outcome(l2, swa, walk2)
    assert list(a['callbacks'])==['walk','early_stopping','snapshot_ensemble'] and len(a['callbacks']['snapshot_ensemble']['members'])==fge.n_members>1
    assert a['callbacks']['early_stopping'].keys()=={'best','wait'} and 'epoch,train_loss' in a['files'][str(tmp_path/'history.csv')]
    assert list(b['rows'])==['train_loss','valid_loss','accuracy','swa_loss','swa_accuracy'] and len(b['losses'])==20 and b['callbacks']['swa']['n']==swa.n_averaged
    assert len(a['callbacks']['walk']['lines'])==20 and set(a['streams'])=={'torch','numpy','python','loader 0 stream 0','loader 1 stream 0'}
    before = fit_outcome(l2, swa, walk2)
    swa.restore(l2)
    l2.opt.set_hyper('lr', .5)
    now = fit_outcome(l2, swa, walk2)
    assert b.differences(before)==[] and any('model' in o for o in b.differences(now))
    assert any(o.startswith('hypers') for o in b.differences(now)) and not b.differences(now, but=['model','hypers','optimizer','callbacks'])

@pytest.mark.parametrize('draw', [lambda l: torch.rand(1), lambda l: np.random.rand(), lambda l: random.random(), lambda l: l.dls.train.rng.random(), lambda l: l.dls.valid.rng.random()])
def test_each_stream_is_looked_at(draw):
    l = make()
    was = random_streams(l)
    draw(l)
    assert sum(v!=was[k] for k,v in random_streams(l).items())==1

def test_a_walk_that_was_made_twice(tmp_path):
    w = Walk(tmp_path/'w')
    (tmp_path/'w').write_text('epoch 0 batch 0: aa\nepoch 0 batch 1: bb\nepoch 0 batch 1: bb\nepoch 0 batch 0: cc\n')
    assert w.state_dict()['lines']==['epoch 0 batch 0: aa and then cc','epoch 0 batch 1: bb']
    fit(make(), 1, cbs=[Walk(tmp_path/'v'), v:=Walk()])
    assert (tmp_path/'v').read_text().splitlines()==v.lines and len(v.lines)==5
    l = learner(splitter=two_groups)
    fit(l, 1, method='fine_tune', cbs=(v:=Walk()))
    assert [o.split(':')[0] for o in (v.lines[0],v.lines[5])]==['frozen epoch 0 batch 0','epoch 0 batch 0']

# ---- with and without

class Draws(Callback):
    "Draws a number"
    run_valid = False
    def __init__(self, f): self.f = f
    def after_step(self): self.f()
class Valid(Draws): run_valid,after_step = True,None
class Nudge(Callback):
    "Changes one weight, in the last iteration"
    def after_train(self): self.learn.model[1].weight.data[0,0] += 1e-7
class Mode(Callback):
    "Leaves dropout on in a validation"
    order = 5
    def before_validate(self): self.learn.model.train()

@pytest.mark.parametrize('cb,says', [(Draws(lambda: torch.rand(1)), 'walk'), (Draws(lambda: np.random.rand()), 'streams numpy'), (Draws(random.random), 'streams python'), (Nudge(), 'walk'), (Mode(), 'rows valid_loss'),
    (ParamScheduler({'lr':lambda p: .1 if p<.85 else .2}), 'rates'), (Callback(after_fit=lambda self: torch.rand(1)), 'streams torch'), (Callback(after_fit=lambda self: self.learn.model[1].weight.data.mul_(2)), 'model 1.weight')])
def test_a_callback_that_changes_the_training_is_found_out(cb, says):
    assert any(says in o for o in same_with_and_without(seeded_make, one_fit, cb))

def test_harmless_ones():
    state_ = random_streams(make())
    for cb in (EMA(install=False, eval_every=1, check=False), [Draws(lambda: None), EarlyStoppingCallback(patience=9)]): assert same_with_and_without(seeded_make, one_fit, cb)==[]
    got = same_with_and_without(seeded_make, one_fit, EMA(check=False))
    assert got and all(o.startswith('model') for o in got) and same_with_and_without(seeded_make, one_fit, EMA(check=False), EMA(check=False))==[]
    assert random_streams(make()).keys()==state_.keys()

def test_the_caller_keeps_its_streams_and_learns_of_a_make_that_is_not_seeded():
    was = torch.get_rng_state(),random.getstate()
    same_with_and_without(seeded_make, one_fit, [])
    assert torch.equal(was[0], torch.get_rng_state()) and was[1]==random.getstate()
    with pytest.raises(ValueError, match='make.. gives another learner each time'): same_with_and_without(lambda: Learner(dls(), nn.Linear(8,8), loss_func=F.mse_loss), one_fit, [])

# ---- killed

class Noise(Callback):
    "Needs all there is: three random streams, and a rate that depends on what has been"
    run_valid = False
    def before_batch(self): self.learn.xb = (self.learn.xb[0]+np.random.rand()*.1+random.random()*.1,)
    def after_epoch(self): self.learn.opt.set_hyper('lr', self.learn.opt.hypers[-1]['lr']*.9)

class Checkpoint(Callback):
    "After each epoch all that an exact resume needs, but for the `faults`"
    order = -10_000
    def __init__(self, faults=()): self.faults,self.file,self.done = faults,Path('state.pt'),0

    def parts(self):
        l,rec,dl = self.learn,self.learn.recorder,self.learn.dls.train
        model = {k:v for k,v in l.model.state_dict().items() if 'statistics' not in self.faults or 'running' not in k}
        return dict(model=(lambda: model, lambda v: l.model.load_state_dict(v, strict=False)), momentum=(lambda: l.opt.state_dict()['state'], lambda v: l.opt.load_state_dict(dict(state=v, hypers=l.opt.hypers))),
            hypers=(lambda: [dict(o) for o in l.opt.hypers], lambda v: [o.update(n) for o,n in zip(l.opt.hypers, v)]), torch=(torch.get_rng_state, torch.set_rng_state), python=(random.getstate, random.setstate),
            numpy=(np.random.get_state, np.random.set_state), loader=(dl.rng.getstate, lambda v: dl.rng.setstate(v)), valid=(l.dls.valid.rng.getstate, lambda v: l.dls.valid.rng.setstate(v)),
            recorder=(lambda: {k:list(getattr(rec, k)) for k in ('values','losses','lrs','iters')}, lambda v: vars(rec).update(v)),
            smooth=(lambda: (rec.smooth_loss.val,rec.smooth_loss.count), lambda v: vars(rec.smooth_loss).update(val=v[0], count=v[1])))

    def before_epoch(self):
        if self.learn.epoch==0 and self.file.exists(): self.state = torch.load(self.file, weights_only=False)
        self.done = self.state['done'] if hasattr(self, 'state') else 0
        skip = self.learn.epoch<self.done
        for cb in self.learn.cbs: cb.run = cb in (self,) or not skip
        if skip: raise CancelEpochException
        if self.learn.epoch==self.done: self.go_on()
    def go_on(self):
        for k,(_,put) in self.parts().items():
            if hasattr(self, 'state') and k in self.state: put(self.state[k])
    def after_fit(self):
        if self.learn.n_epoch==self.done and 'nothing left' not in self.faults: self.go_on()
    def save(self):
        if self.learn.epoch<self.done: return
        state = dict({k:get() for k,(get,_) in self.parts().items() if k not in self.faults}, done=self.learn.epoch+('one too few' not in self.faults))
        tmp = self.file if 'atomic' in self.faults else Path('tmp')
        torch.save(state, tmp)
        if tmp!=self.file: os.replace(tmp, self.file)

class Saver(Callback):
    order = 10_000
    def __init__(self, ck): self.ck = ck
    def after_epoch(self): self.ck.save()

def training(*faults, workers=0):
    def run():
        l = make(n=100, bs=25, n_valid=40, workers=workers)
        ck,walk = Checkpoint(faults),Walk('walk.txt')
        fit(l, 3, cbs=[ck, Saver(ck), Noise(), walk])
        return fit_outcome(l, walk)
    return run

@pytest.fixture(scope='module')
def whole():
    h = killed_fit(training())
    assert h.codes==[0] and h.steps==[12] and not h.killed and not h.orphans
    return h.outcome

@forks
@pytest.mark.parametrize('fault,says', [('model','model'), ('momentum','optimizer'), ('statistics','running_mean'), ('hypers','hypers'), ('torch','streams torch'), ('numpy','streams numpy'), ('python','streams python'),
    ('loader','loader 0'), ('valid','loader 1'), ('recorder','losses'), ('smooth','rows train_loss'), ('one too few','walk')])
def test_what_a_checkpoint_forgets_is_found(fault, says, whole):
    h = killed_fit(training(fault), AtEvent('before_train', 3))
    assert h.codes==[-9,0] and h.steps==[8,8 if fault=='one too few' else 4]
    assert any(says in o for o in whole.differences(h.outcome))

@forks
def test_a_file_that_is_not_replaced_as_a_whole_is_found(whole):
    at = AtWrite('torch.save', 2, .5)
    with pytest.raises(ChildError, match=r'(?s)life 2 ended with code 1.*(central directory|Invalid argument|zip)'): killed_fit(training('atomic'), at)
    assert not whole.differences(killed_fit(training(), at, AtWrite('os.replace', 1, 1)).outcome)

@forks
def test_killed_after_the_last_epoch_is_found(whole):
    at = AtEvent('after_fit', 1, order=-20_000)
    assert not whole.differences(killed_fit(training(), at).outcome)
    assert any('model' in o for o in whole.differences(killed_fit(training('nothing left'), at).outcome))

@forks
def test_many_histories_of_a_checkpoint_that_is_right():
    df = kill_many(training(), 4, seed=1)
    assert list(df.fault)==['']*4 and df.kills.sum()>=4 and not df.orphans.any() and (df.repeated<=8*df.kills).all()

@forks
def test_many_histories_of_one_that_is_not_and_of_a_run_that_is_not_seeded():
    df = kill_many(training('atomic','torch'), 2, seed=21, kills=1, by=['write'])
    assert list(df.killed.str.replace(r'\d\d%', 'partly', regex=True))==['torch.save 3 (partly written)','torch.save 2 (after)'] and 'life 2 ended with code 1: ' in df.fault[0] and 'model' in df.fault[1]
    assert list(df.repeated.isna())==[True,False] and df.repeated[1]==0
    with pytest.raises(ValueError, match='two unbroken trainings differ'): kill_many(lambda: os.getpid(), 1)
    with pytest.raises(ChildError, match='(?s)life 1 ended with code 1.*ZeroDivisionError'): kill_many(lambda: 1/0, 1)

@forks
@pytest.mark.parametrize('sig,code', [(signal.SIGTERM,-15), (signal.SIGINT,130)])
def test_other_signals(sig, code, whole):
    h = killed_fit(training(), AtEvent('after_step', 6), sig=sig)
    assert h.codes==[code,0] and h.steps==[6,8] and not whole.differences(h.outcome)

@forks
def test_a_signal_that_is_swallowed_or_answered_with_a_code_of_its_own():
    def swallow():
        try: time.sleep(5)
        except KeyboardInterrupt: pass
        return 3
    h = killed_fit(swallow, .3, sig=signal.SIGINT)
    assert h.codes==[0] and h.outcome==3 and not h.killed
    def own():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        time.sleep(.6)
        return 4
    h = killed_fit(own, .2, sig=signal.SIGTERM)
    assert h.codes==[143,0] and h.killed==['0.20 s'] and h.outcome==4
    def wrong():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        time.sleep(5)
    with pytest.raises(ChildError, match='life 1 ended with code 7'): killed_fit(wrong, .2, sig=signal.SIGTERM)

@forks
def test_loader_workers_are_waited_for_and_orphans_told_of(whole):
    h = killed_fit(training(workers=2), AtEvent('after_batch', 2))
    assert h.codes==[-9,0] and h.orphans==0 and h.steps==[2,12]
    def leave():
        if os.fork()==0:
            time.sleep(60)
            os._exit(0)
        return 1
    t = time.time()
    assert killed_fit(leave, patience=.3).orphans==1 and time.time()-t<10

@forks
def test_what_a_child_prints_and_where_it_is_and_that_it_is_given_up():
    here = os.getcwd(),torch.save,list(defaults.callbacks),torch.get_num_threads()
    def run():
        print('hello from the child')
        os.system('echo and from a process of its own')
        Path('left').write_text('x')
        return os.getcwd(),torch.get_num_threads(),sorted(os.listdir())
    h = killed_fit(run)
    assert 'hello from the child' in h.output and 'and from a process' in h.output and h.outcome[0]!=here[0] and h.outcome[1:]==(1,['left'])
    assert killed_fit(run, lambda die: Path('before').write_text('x')).outcome[2]==['before','left']
    with pytest.raises(ChildError, match='did not end within 0.3 s'): killed_fit(lambda: time.sleep(60), timeout=.3)
    assert here==(os.getcwd(),torch.save,list(defaults.callbacks),torch.get_num_threads())

def test_moments_are_checked(monkeypatch):
    for bad,says in [(lambda: AtEvent('after_lunch'),'is no event'), (lambda: AtEvent('after_fit', 0),'n=0'), (lambda: AtWrite('write'),'give one of torch.save')]:
        with pytest.raises(ValueError, match=says): bad()
    assert [str(AtWrite('torch.save', 2, o)) for o in (0,.25,1)]==['torch.save 2 (before)','torch.save 2 (25% written)','torch.save 2 (after)'] and 'before' in str(AtWrite('os.fsync'))
    monkeypatch.delattr(os, 'fork', raising=False)
    with pytest.raises(NotImplementedError, match='Linux'): killed_fit(lambda: 1)

def test_cuda_that_is_in_use_is_told_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.raises(RuntimeError, match='CUDA is in use'): killed_fit(lambda: 1)

# ---- damaged

@pytest.fixture
def file(tmp_path):
    seed()
    torch.save({k:torch.randn(30) for k in 'ab'}, tmp_path/'w.pt')
    return tmp_path/'w.pt'

def test_copies_are_damaged_each_in_its_way(file):
    good,seen = file.read_bytes(),[]
    for copy,said in damaged(file, 60, seed=1):
        assert copy.name=='w.pt' and copy!=file and copy.read_bytes()!=good
        seen.append((said,copy.read_bytes()))
    assert file.read_bytes()==good and not copy.exists() and len({said for said,_ in seen})>40
    for word in ('cut off','flipped','64 bytes zeroed','in a tensor','empty','a text','another file','runs something'): assert any(word in said for said,_ in seen)
    assert all((said,c.read_bytes())==o for o,(c,said) in zip(seen, damaged(file, 60, seed=1)) if 'runs something' not in said)
    spans = list(testing._tensor_spans(file))
    whole_ = torch.load(file)
    assert [torch.frombuffer(bytearray(good[i:i+n]), dtype=torch.float32).tolist() for i,n in spans]==[whole_[k].tolist() for k in 'ab']
    (file.parent/'t.txt').write_text('plain text of some length')
    assert len(list(damaged(file.parent/'t.txt', 20)))==20

def careful(path):
    from fastswa.utils import read_file
    got = read_file(path)
    if got.keys()!={'a','b'}: raise ValueError(f'{path}: another file')
    return got

def test_a_careful_reader_has_no_fault(file):
    df = check_refused(careful, file, 200)
    assert len(df)==200 and not any(df.fault) and set(df.result)<={'refused','read'}

def anonymous(path):
    try: return careful(path)
    except Exception: raise ValueError('some file is damaged')

def test_readers_that_are_not_careful_are_found(file):
    kept = {}
    def early(path):
        kept['path'] = str(path)
        return careful(path)
    for load,says,target in [(torch.load,'other values',None), (anonymous,'does not name the file',None), (partial(torch.load, weights_only=False),'was run',None), (early,'and yet path',lambda: kept)]:
        assert any(says in o for o in check_refused(load, file, 40, target=target).fault), says

# ---- interrupted

class Holds(Callback):
    "Doubles a weight for a while, and puts it back when the event comes"
    def __init__(self, put_back): self.put_back = put_back
    def before_fit(self): self.weight = self.learn.model[1].weight.detach().clone(); self.learn.doubled = True
    def undo(self): self.learn.doubled = False
    def after_fit(self): self.undo()
    def after_cancel_fit(self):
        if self.put_back=='wrong error': raise TypeError('not this one')
    def after_batch(self):
        if self.put_back=='never' and not self.learn.training: raise CancelValidException

def is_undone(learn): return 'still doubled' if getattr(learn, 'doubled', False) else None

def test_what_stays_after_an_interrupt_is_found():
    go = lambda put_back, *excs: interrupt_everywhere(lambda: make(n=40, bs=20, n_valid=20), lambda l,cbs: l.fit(1, cbs=[Holds(put_back), *cbs]), is_undone, excs, orders=(500,))
    df = go('after_fit', KeyboardInterrupt, CancelFitException, ValueError)
    held = df[df.fault!='']
    assert set(held.fault)=={'still doubled'} and {'KeyboardInterrupt','ValueError'}<=set(held.exception) and 'after_batch' in set(held.event)
    assert not any(df[(df.exception=='CancelFitException')&(df.event=='before_batch')].fault) and {'1 of 3','3 of 3'}<=set(df[df.event=='after_batch'].which)
    assert any('the fit ended with TypeError: ' in o for o in go('wrong error', CancelFitException).fault)

def test_asserts_of_a_check_and_all_exceptions():
    def check(l): assert not l.opt, 'has an optimizer'
    df = interrupt_everywhere(lambda: make(n=20, bs=20, n_valid=20), lambda l,cbs: l.fit(1, cbs=cbs), check, when=['first'])
    assert set(df.fault)=={'AssertionError: has an optimizer'} and df.exception.nunique()==10 and {'before_fit','after_step','after_fit'}<=set(df.event)
    assert set(df.order)=={1000} and not df.event.str.contains('cancel|create').any()
