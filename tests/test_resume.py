"Promises 8 and 13: stopped and gone on with, files that are whole, and a state that is that of this walk"
import math, os, random, threading, warnings
from copy import deepcopy

import pytest, torch
from common import *
from fastswa import utils
from fastswa.callback import SWA
from fastswa.ema import EMA
from fastswa.lawa import LAWA
from fastswa.testing import check_refused, damaged

def told(f, match):
    "What is warned of that matches"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in ws if match in str(w.message)]

# ---- the walk goes on to the bit

class Checkpoint(Callback):
    "All of a learner at the end of an epoch, as an exact resume needs it; dies there"
    order = 2000
    def __init__(self, epoch): self.epoch_ = epoch
    def after_epoch(self):
        l = self.learn
        if l.epoch!=self.epoch_ or l.lock.locked(): return
        opt = l.opt.state_dict()
        self.kept = state(l.model),deepcopy(opt),torch.get_rng_state(),random.getstate(),np.random.get_state(),l.dls.train.rng.getstate()
        raise KeyboardInterrupt
    def put(self, learn):
        model,opt,*streams = self.kept
        if learn.opt is None: learn.create_opt()
        learn.model.load_state_dict(model)
        learn.opt.load_state_dict(deepcopy(opt))
        self.streams = streams
    def resume(self): return GoOn(self)

class GoOn(Callback):
    "The random streams of the checkpoint, before anybody can draw from them"
    order = -1000
    def __init__(self, point): self.point = point
    def before_train(self):
        if not hasattr(self, 'done'):
            self.done = True
            t,p,n,dl = self.point.streams
            torch.set_rng_state(t)
            random.setstate(p)
            np.random.set_state(n)
            self.learn.dls.train.rng.setstate(dl)

class Hypers(Callback):
    "Rate and momentum of each step"
    order,run_valid = 1000,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append([(h['lr'],h.get('mom')) for h in self.learn.opt.hypers])

@pytest.mark.parametrize('how', ['file','same object','nothing saved','file of 0.3.0'])
@pytest.mark.parametrize('epoch', [1,3,5])                 # before averaging begins, when it has begun, and later
@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_the_rest_of_the_walk_is_the_same_to_the_bit(method, epoch, how, tmp_path):
    "At 6 epochs and start=.5: with momentum and peaks as they were held"
    if how in ('nothing saved','file of 0.3.0') and method=='fit': return
    make = lambda **kw: learner(net(.3), splitter=two_groups, **kw)
    new = lambda **kw: SWA(start=.5, cycle_len=.4, check=False, **kw)
    lr = slice(.01,.1)
    full,whole,hyp = make(),new(),Hypers()
    fit(full, 7, lr, method=method, cbs=[whole, hyp])
    l,swa,point = make(),new(save_to=tmp_path/'s.pt'),Checkpoint(epoch)
    with pytest.raises(KeyboardInterrupt): fit(l, 7, lr, method=method, cbs=[swa, point])
    if how!='same object':
        l = make(s=5)
        if how=='file of 0.3.0' and (tmp_path/'s.pt').exists():
            old = torch.load(tmp_path/'s.pt', weights_only=True)
            del old['moms']
            torch.save(old, tmp_path/'s.pt')
        swa = new()
        if how!='nothing saved' and (tmp_path/'s.pt').exists(): swa.load(tmp_path/'s.pt')
    point.put(l)
    rest = Hypers()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(l, 7, lr, method=method, start_epoch=epoch+1, cbs=[swa, rest, point.resume()])
    assert rest.seen==hyp.seen[(epoch+1)*5:]
    swa.restore(l)
    if how!='nothing saved' or epoch==1:
        assert swa.collected==whole.collected
        swa.apply(l)
        assert same(state(l.model), state(full.model))
        whole.restore(full)
        swa.restore(l)
    else: whole.restore(full)
    assert same(state(l.model), state(full.model))

def test_held_momentum_after_ctrl_c_in_fine_tune_and_one_cycle():
    def run(stop):
        l,hyp = learner(splitter=two_groups),Hypers()
        swa = SWA(start=.4, cycle_len=.4, check=False)
        if not stop:
            fit(l, 6, .1, method='fit_one_cycle', cbs=[swa, hyp])
            return hyp.seen
        point = Checkpoint(3)
        with pytest.raises(KeyboardInterrupt): fit(l, 6, .1, method='fit_one_cycle', cbs=[swa, point])
        fit(l, 6, .1, method='fit_one_cycle', start_epoch=4, cbs=[swa, hyp])
        return hyp.seen
    assert run(True)==run(False)[20:]

def test_momentum_that_no_schedule_tells_of_is_in_the_file(tmp_path):
    class Mom(Callback):
        order,run_valid = 58,False
        def before_batch(self): self.learn.opt.set_hyper('mom', .9-.02*(5*self.learn.epoch+self.learn.iter))
    def run(l, swa, *cbs, **kw):
        hyp = Hypers()
        try: fit(l, 6, .1, cbs=[swa, Mom(), hyp, *cbs], **kw)
        except KeyboardInterrupt: pass
        return hyp.seen
    new = lambda **kw: SWA(start=.5, cycle_len=.4, check=False, **kw)
    whole = run(learner(), new())
    run(learner(), new(save_to=tmp_path/'s.pt'), Checkpoint(4))
    assert run(learner(), new().load(tmp_path/'s.pt'), start_epoch=5)==whole[25:] and len({m for o in whole[16:] for _,m in o})==1

class StopWithin(Callback):
    "Ctrl-C within an epoch"
    order,run_valid = 2000,False
    def __init__(self, epoch, it): self.at = epoch,it
    def after_batch(self):
        if (self.learn.epoch,self.learn.iter)==self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('make,kept', [(lambda **kw: SWA(start=.5, cycle_len=.4, check=False, **kw), [30,32,34]), (lambda **kw: EMA(check=False, **kw), None)])
def test_snapshots_of_a_part_that_is_made_again_are_told_of(make, kept, tmp_path):
    "A running mean cannot forget them: once, with what is exact; nothing is said where there are none"
    def stopped(*at):
        l,cb = learner(),make(save_to=tmp_path/'s.pt')
        with pytest.raises(KeyboardInterrupt): fit(l, 8, cbs=[cb, StopWithin(*at)])
        return l,cb
    l,cb = stopped(6, 4)
    if kept: assert cb.collected[-3:]==kept
    ws = told(lambda: fit(l, 8, start_epoch=6, cbs=cb), 'counted twice')
    name = type(cb).__name__
    assert len(ws)==1 and 'goes on after 30 iterations' in ws[0] and f"{name}(...).load('{tmp_path/'s.pt'}')" in ws[0]
    assert 'of up to 34:' in ws[0]
    l,cb = stopped(6, 0)
    if kept: assert cb.collected[-1]==30 and not told(lambda: fit(l, 8, start_epoch=6, cbs=cb), 'twice')
    else: assert told(lambda: fit(l, 8, start_epoch=6, cbs=cb), 'of up to 31:')
    if kept: assert cb.collected==[*range(22,41,2)]

@pytest.mark.parametrize('at,now,left', [((6,4),6,[24,27,30]), ((6,4),5,[24]), ((6,4),3,[]), ((6,0),6,[21,24,27,30])])
def test_a_window_forgets_the_part_that_is_made_again(at, now, left):
    "Of the last four, one each three iterations"
    l,lawa,spy = learner(),LAWA(4, every=.6, check=False),Spy()
    with pytest.raises(KeyboardInterrupt): fit(l, 9, cbs=[lawa, spy, StopWithin(*at)])
    first = spy.ws
    class Look(Callback):
        order,run_valid = 2000,False
        seen = None
        def before_batch(self):
            if self.seen is not None: return
            mean = [o.clone() for o in lawa._average.weights.average] if lawa.n_averaged else []
            self.seen = lawa.n_averaged,list(lawa.collected),mean
    look,rest = Look(),Spy()
    assert not told(lambda: fit(l, 9, start_epoch=now, cbs=[lawa, look, rest]), 'twice')
    n,collected,mean = look.seen
    assert n==len(left) and collected==left
    for k,w in enumerate(mean): torch.testing.assert_close(w.double(), torch.stack([first[i-1][k].double() for i in left]).mean(0), atol=1e-6, rtol=1e-6)
    assert lawa.collected==[36,39,42,45]
    for p,w in zip(l.model.parameters(), rest.mean([i-5*now for i in lawa.collected])): torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=1e-6)

# ---- nothing left to train

@pytest.mark.parametrize('how', ['file','same object'])
def test_a_fit_with_nothing_left_is_finished(how, tmp_path):
    "Killed in the last refresh"
    full,whole = learner(shuffle=False),SWA(); fit(full, 4, cbs=whole)
    l,swa = learner(shuffle=False),SWA(save_to=tmp_path/'s.pt')
    class Kill(Callback):
        order = -100
        def after_fit(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(l, 4, cbs=[swa, Kill()])
    assert not swa._average.applied
    if how=='file':
        w = state(l.model)
        l,swa = learner(s=3, shuffle=False),SWA().load(tmp_path/'s.pt')
        l.model.load_state_dict(w)
    fit(l, 4, start_epoch=4, cbs=swa)
    assert swa.n_averaged==5 and swa._average.weights.is_applied()
    for k,v in state(full.model).items(): torch.testing.assert_close(v.float(), l.model.state_dict()[k].float(), atol=1e-6, rtol=1e-5)
    assert same(weights(full.model), weights(l.model))

def test_nothing_left_and_nothing_known():
    l = learner()
    w = state(l.model)
    assert len(told(lambda: fit(l, 4, start_epoch=4, cbs=SWA()), 'nothing was averaged'))==1
    assert same(state(l.model), w)

# ---- a state that meets the wrong fit

def test_a_state_that_meets_a_fit_from_its_beginning_is_told_before_the_first_step(tmp_path):
    fit(learner(), 4, cbs=SWA(save_to=tmp_path/'s.pt'))
    class First(Callback):
        run_valid = False
        def before_batch(self): raise KeyboardInterrupt
    for method in ('fit','fit_flat_cos'):
        swa = SWA().load(tmp_path/'s.pt')
        def go():
            with pytest.raises(KeyboardInterrupt): fit(learner(), 8, method=method, start_epoch=4*(method=='fit_flat_cos'), cbs=[swa, First()])
        assert len(ws:=told(go, 'start_epoch=4'))==1 and 'fit_flat_cos ignores it' in ws[0]

@pytest.mark.parametrize('kw', [dict(every_epoch=True), dict()])
def test_skipped_epochs_do_not_write_over_checkpoints(kw, tmp_path):
    l = learner(path=tmp_path)
    fit(l, 4, cbs=[SWA(check=False), SaveModelCallback(**kw)])
    files = {o:o.read_bytes() for o in (tmp_path/'models').iterdir()}
    class Stop(Callback):
        order = 10**4
        def before_train(self): raise KeyboardInterrupt
    new,save = learner(path=tmp_path, s=4),SaveModelCallback(**kw)
    with pytest.raises(KeyboardInterrupt): fit(new, 8, start_epoch=4, cbs=[SWA(), save, Stop()])
    assert {o:o.read_bytes() for o in (tmp_path/'models').iterdir()}==files and save.run
    if kw:
        fit(new, 6, start_epoch=4, cbs=[SWA(check=False), SaveModelCallback(**kw)])
        have = {o:o.read_bytes() for o in (tmp_path/'models').iterdir()}
        assert len(have)==6 and all(have[o]==v for o,v in files.items())

# ---- files

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A file, and what a learner is like with it"
    file = tmp_path_factory.mktemp('saved')/'swa.pt'
    l,swa = learner(),SWA(check=False); fit(l, 3, cbs=swa)
    swa.save(file)
    return file.read_bytes()

def test_damaged_files_are_refused_by_name(saved, tmp_path):
    "Or read as they were (padding, time stamps); a callback that refuses one is left as it is"
    file,swa = tmp_path/'swa.pt',SWA()
    file.write_bytes(saved)
    df = check_refused(lambda f: swa.load(f).state_dict(), file, 120, target=swa.state_dict)
    assert not any(df.fault), df[df.fault!='']
    for f,_ in damaged(file, 4):
        with pytest.raises(ValueError) as e: SWA().load(f)
        assert 'weights_only' not in str(e.value)
    (tmp_path/'folder').mkdir()
    with pytest.raises(FileNotFoundError, match='folder'): SWA().load(tmp_path/'folder')

@pytest.mark.parametrize('at,bit,says', [(38,4,'is marked as a folder'), (46,7,"can't decode")])
def test_a_bit_that_no_checksum_covers(at, bit, says, saved, tmp_path):
    "In the zip's list of its files: torch would read a folder as a tensor of what was in memory, zipfile stumbles over a name"
    data = bytearray(saved)
    name = data.rindex(b'/data/0')
    entry = data.rindex(b'PK\x01\x02', 0, name)
    data[entry+at] ^= 1<<bit
    (tmp_path/'s.pt').write_bytes(data)
    with pytest.raises(ValueError, match=says) as e: SWA().load(tmp_path/'s.pt')
    assert str(tmp_path/'s.pt') in str(e.value)

def test_a_file_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir,(str(tmp_path/'evil'),)
    torch.save(dict(n=1, average=Evil()), tmp_path/'e.pt')
    with pytest.raises(ValueError, match='holds more than tensors and numbers'): SWA().load(tmp_path/'e.pt')
    assert not (tmp_path/'evil').exists()

def changed(**kw): return lambda s: s.update(kw)
def poisoned(s): next(iter(s['average'].values()))[0] = math.nan
def negative(s): next(iter(s['bn'].values()))[1][0] = -1.
def wrong_shape(s): k = next(iter(s['average'])); s['average'][k] = s['average'][k][:1]
def wrong_stats(s): k = next(iter(s['bn'])); s['bn'][k] = tuple(o[:2].clone() for o in s['bn'][k])
def other_layer(s): s['bn']['7'] = next(iter(s['bn'].values()))
def no_peaks(s): del s['peaks']

@pytest.mark.parametrize('spoil,where', [(changed(n=-3),'load'), (changed(n=2.5),'load'), (changed(n=True),'load'), (changed(done='x'),'load'), (changed(peaks=[math.nan]),'load'), (changed(moms='x'),'load'),
    (changed(collected=None),'load'), (changed(average=[1]),'load'), (changed(layers='1'),'load'), (changed(bn={'1':3}),'load'), (negative,'load'), (no_peaks,'load'),
    (poisoned,'apply'), (wrong_shape,'apply'), (wrong_stats,'apply'), (other_layer,'apply'), (changed(n=0),'load')])
def test_a_malformed_state_changes_nothing(spoil, where, saved, tmp_path):
    (tmp_path/'s.pt').write_bytes(saved)
    s = torch.load(tmp_path/'s.pt', weights_only=True)
    s['bn'] = {k:tuple(o.clone() for o in v) for k,v in s['bn'].items()}
    spoil(s)
    torch.save(s, tmp_path/'s.pt')
    swa,l = SWA(),learner(s=2)
    before = state(l.model)
    def go():
        swa.load(tmp_path/'s.pt')
        with quiet(l): swa.apply(l)
    with pytest.raises(ValueError) as e: go()
    assert same(state(l.model), before)
    assert (swa._average is None)==(where=='load') or where=='apply'
    if where=='load': assert 's.pt' in str(e.value)

def test_load_state_dict_of_what_is_no_state():
    with pytest.raises(TypeError, match='a list'): SWA().load_state_dict([1])
    with pytest.raises(ValueError, match='it has no'): SWA().load_state_dict({})
    with pytest.raises(FileNotFoundError, match='nowhere.pt'): SWA().load('nowhere.pt')

# ---- the place of save_to

def test_a_place_that_cannot_be_written_is_told_before_the_first_step(tmp_path):
    (tmp_path/'file').write_text('')
    l = learner()
    before = state(l.model)
    for place in (tmp_path, tmp_path/'file'/'s.pt'):
        with pytest.raises(ValueError, match='save_to='): fit(l, 2, cbs=SWA(save_to=place))
    assert same(state(l.model), before)
    fit(l, 2, cbs=SWA(save_to=tmp_path/'new'/'s.pt'))
    assert [o.name for o in (tmp_path/'new').iterdir()]==['s.pt']            # nothing else is left there

def test_a_failed_write_warns_once_and_the_training_goes_on(tmp_path, monkeypatch):
    "The disk is full in the third and fourth epoch"
    l,swa,file = learner(),SWA(start=1, cycle_len=1, save_to=tmp_path/'s.pt', check=False),tmp_path/'s.pt'
    real,n = os.replace,[]
    def full(*args):
        n.append(1)
        if len(n) in (2,3): raise OSError(28, 'No space left on device')
        return real(*args)
    monkeypatch.setattr(utils.os, 'replace', full)
    ws = told(lambda: fit(l, 5, cbs=swa), 'could not be written')
    assert len(ws)==1 and 'No space left' in ws[0] and str(file) in ws[0]
    assert swa.n_averaged==4 and SWA().load(file).n_averaged==4 and len(list(tmp_path.iterdir()))==1

def test_two_writers_of_one_file(tmp_path):
    "Each file is whole at any moment, whoever writes it"
    file,errors = tmp_path/'s.pt',[]
    def write(k):
        for _ in range(20):
            try: utils.write_file(dict(k=k, w=torch.full((1000,), float(k))), file)
            except Exception as e: errors.append(e)
    ts = [threading.Thread(target=write, args=(k,)) for k in range(3)]
    for t in ts: t.start()
    while any(t.is_alive() for t in ts):
        if file.exists():
            s = utils.read_file(file)
            assert (s['w']==s['k']).all()
    for t in ts: t.join()
    assert not errors and [o.name for o in tmp_path.iterdir()]==['s.pt']

# ---- after an interrupt, and elsewhere

def test_copy_to_after_an_interrupt_says_what_is_missing(tmp_path):
    l,swa = learner(),SWA(start=1, cycle_len=1)
    class Stop(Callback):
        def before_epoch(self):
            if self.learn.epoch==3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(l, 5, cbs=[swa, Stop()])
    assert len(told(lambda: swa.copy_to(net()), 'BatchNorm statistics of this copy are not those of the average'))==1
    swa.save(tmp_path/'s.pt')
    assert len(told(lambda: SWA().load(tmp_path/'s.pt').copy_to(net()), 'never measured'))==1
    with quiet(l): swa.apply(l)
    assert not told(lambda: swa.copy_to(net()), 'BatchNorm')

def test_copy_to_after_load(tmp_path):
    l,swa = learner(),SWA(); fit(l, 3, cbs=swa)
    swa.save(tmp_path/'s.pt')
    got = SWA().load(tmp_path/'s.pt').copy_to(net())
    want = state(l.model)
    assert same({k:v for k,v in state(got).items() if 'tracked' not in k}, {k:v for k,v in want.items() if 'tracked' not in k})
    with pytest.raises(ValueError, match='another architecture'): SWA().load(tmp_path/'s.pt').copy_to(plain_net())
    with pytest.raises(RuntimeError, match='there is no average yet'): SWA().copy_to(net())

def test_an_average_that_was_loaded_and_put_in_is_saved_as_it_was(saved, tmp_path):
    (tmp_path/'a').write_bytes(saved)
    swa,l = SWA().load(tmp_path/'a'),learner(s=1)
    with quiet(l): swa.apply(l)
    swa.save(tmp_path/'b')
    a,b = (torch.load(tmp_path/o, weights_only=True) for o in 'ab')
    assert all(a[k]==b[k] for k in ('n','done','peaks','moms','collected','layers')) and same(a['average'], b['average'])

def test_a_place_that_cannot_be_written_costs_no_earlier_average(tmp_path):
    l,swa = learner(),SWA()
    fit(l, 4, cbs=swa)
    swa.restore(l)
    n,swa.save_to = swa.n_averaged,tmp_path
    with pytest.raises(ValueError, match='cannot be written'): fit(l, 4, cbs=swa)
    assert swa.n_averaged==n>0
