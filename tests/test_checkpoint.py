"The files of a run: what goes in comes out, damage is found, and whoever is killed leaves a whole one"
import errno,io,multiprocessing,os,random,signal,sys,threading,time,warnings,zipfile
from collections import OrderedDict,namedtuple
from pathlib import Path

import numpy as np, pytest, torch
from fastai.torch_core import TensorBase,TensorImage
from fastcore.foundation import L
from hypothesis import given,settings,strategies as st
from torch import nn

from fastswa import checkpoint
from fastswa.checkpoint import RunFolder,from_saved,is_plain,to_saved
from fastswa.utils import write_file

fork = multiprocessing.get_context('fork')

def through_a_file(o):
    f = io.BytesIO()
    torch.save(to_saved(o), f)
    f.seek(0)
    return from_saved(torch.load(f, weights_only=True))

def same(a, b):
    "Equal, of the same types all the way down, NaN equal to NaN"
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor): return a.dtype==b.dtype and a.shape==b.shape and a.layout==b.layout and bits(a)==bits(b)
    if isinstance(a, (np.ndarray,np.generic)): return a.dtype==b.dtype and a.shape==b.shape and a.tobytes()==b.tobytes()
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(map(same, a, b))
    if isinstance(a, dict): return same(list(a), list(b)) and same(list(a.values()), list(b.values())) and same(getattr(a, '__dict__', 0), getattr(b, '__dict__', 0))
    if isinstance(a, (float,complex)): return repr(a)==repr(b)
    return a==b

def bits(t): return t.to_dense().resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else []

# ---- what goes in comes out

plain = [None, True, 3, -2**63, 2**63, -2**200, 10**5000, .1, float('nan'), -float('inf'), -0., 1+2j, complex(0,float('nan')), '', 'ä\0\ud800', b'', b'\0\xff', [], (), ((1,),[2,()]),
    {}, {1:2, None:3, (1,'a'):4, b'x':5, 2.5:6, frozenset([1]):7, True:8, 'a':9}, set(), {1,(2,3)}, frozenset('ab'), L(), L(1,[2],(3,)), L([[1]]), Path('a/b'), Path(), torch.Size([2,3]), torch.Size([]),
    torch.float16, torch.device('cuda', 1), OrderedDict(b=1, a=2), [{'a':[{'b':(L(2),)}]}]]
arrays = [np.arange(6).reshape(2,3), np.array(3.), np.zeros((0,3)), np.array(['a','bc']), np.array([b'a']), np.arange(3, dtype='>i2'), np.array(['2020-01-01'], 'M8[D]'), np.float16([1,np.nan]), np.array([True]),
    np.array([(1,2.)], dtype=[('a','i4'),('b','f8',(1,))]), np.arange(10)[::-2], np.asfortranarray(np.eye(3)[:2]), np.complex64([1j]), np.float32(.1), np.float64('nan'), np.int8(-3), np.bool_(True), np.longdouble(1)/3,
    np.datetime64('2020-01-01T01'), np.timedelta64(3, 's'), np.str_('a\0'), np.str_(), np.bytes_(b'a\0')]
tensors = [torch.tensor(3.), torch.empty(0,3), torch.arange(6).reshape(2,3).t(), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True]), torch.tensor([1+2j]).conj(), torch.randn(4).to(torch.float8_e4m3fn),
    torch.ones(3).expand(2,3), torch.randn(10)[::3], torch.zeros(2,3,4,4).to(memory_format=torch.channels_last), torch.eye(3).to_sparse(), [torch.tensor(float(i)) for i in range(10)], L(torch.ones(2)*i for i in range(9)),
    [torch.ones(i%2+1) for i in range(10)]]

@pytest.mark.parametrize('o', plain+arrays+tensors, ids=lambda o: type(o).__name__)
def test_round_trip(o):
    assert is_plain(o) and is_plain({'x':[o]})
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*sparse')
        assert same(through_a_file(o), o)
        assert same(through_a_file([{'x':(o,L(o))}]), [{'x':(o,L(o))}])

def test_a_models_state_keeps_its_versions():
    m = nn.BatchNorm1d(2)
    back = through_a_file(m.state_dict())
    assert same(back, m.state_dict()) and back._metadata['']=={'version':2}

def test_subclasses_become_plain_tensors():
    t = TensorImage(torch.ones(3))
    t.note = print                                # would be written with it
    for o in t,TensorBase(1.),nn.Parameter(torch.ones(2)),torch.ones(2, requires_grad=True):
        back = through_a_file(o)
        assert type(back) is torch.Tensor and not back.requires_grad and not vars(back) and torch.equal(back, o.detach().as_subclass(torch.Tensor)), o
    assert {type(o) for o in through_a_file([TensorBase(float(i)) for i in range(20)])}=={torch.Tensor}

def test_a_lazy_conjugate_is_written_out():
    assert through_a_file(torch.ones(3, dtype=torch.cfloat).conj()).numpy().tolist()==[1-0j]*3

def test_random_states_go_on():
    own,gen,old = random.Random(3),np.random.default_rng(3),np.random.RandomState(3)
    others = [np.random.Generator(o(3)) for o in (np.random.MT19937,np.random.Philox,np.random.SFC64,np.random.PCG64DXSM)]
    torch_gen = torch.Generator().manual_seed(3)
    back = through_a_file([own.getstate(), gen.bit_generator.state, old.get_state(), old.get_state(legacy=False), torch_gen.get_state(), [o.bit_generator.state for o in others]])
    draws = lambda: [own.random(), gen.random(), old.rand(), torch.rand(1, generator=torch_gen).item(), *(o.random() for o in others)]
    first = draws()
    own.setstate(back[0])
    gen.bit_generator.state = back[1]
    old.set_state(back[2])
    torch_gen.set_state(back[4])
    for o,s in zip(others, back[5]): o.bit_generator.state = s
    assert draws()==first
    old.set_state(back[3])
    assert old.rand()==first[2]

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(), st.sampled_from([*checkpoint._back, 'state', 'format']), st.sampled_from([o for o in arrays+tensors if not isinstance(o, list) and getattr(o, 'layout', torch.strided)==torch.strided]))
keys = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.sampled_from([*checkpoint._back])),
    lambda o: st.one_of(st.lists(o, max_size=3).map(tuple), st.frozensets(o, max_size=3)), max_leaves=4)
states = st.recursive(leaves, lambda o: st.one_of(st.lists(o, max_size=4), st.lists(o, max_size=4).map(tuple), st.lists(o, max_size=4).map(L), st.dictionaries(keys, o, max_size=4), st.sets(keys, max_size=4),
    st.dictionaries(st.text(), o, max_size=3).map(OrderedDict), st.tuples(st.sampled_from([*checkpoint._back]), o)), max_leaves=8)

@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(states)
def test_any_state_round_trips(o):
    assert is_plain(o) and same(through_a_file(o), o)

class Unknown: pass
Pair = namedtuple('Pair', 'a b')
class Name(str): pass
class Wrapped(torch.Tensor):
    def __tensor_flatten__(self): return [],None

@pytest.mark.parametrize('o', [print, Unknown, Unknown(), Pair(1,2), Name('a'), slice(1), np.array([None]), np.array([(None,)], dtype=[('a','O')]), np.ma.array([1]), torch.empty(2, device='meta'), nn.UninitializedParameter(),
    torch.ones(2).as_subclass(Wrapped), {torch.ones(1):2}, {(torch.ones(1),):2}, {torch.ones(1)}, torch.Generator(), range(3), iter([]), errno], ids=lambda o: type(o).__name__)
def test_refused_with_its_place(o):
    assert not is_plain(o) and not is_plain(([o],))
    with pytest.raises(TypeError, match=r"^state\['a'\]\[1\]\['b'\].*A checkpoint holds .* or leave it out$"): to_saved({'a':[0, {'b':o}]})

def test_within_itself_is_refused():
    for o,add in ([],list.append),({},lambda o,v: o.update(a=v)),(L(),lambda o,v: o.append(v)):
        add(o, o)
        assert not is_plain(o)
        with pytest.raises(TypeError, match='goes on for ever'): to_saved(o)

def test_a_view_leaves_the_rest_behind():
    big = torch.zeros(10**6)
    for view in big[5:25],big[::10**5],torch.zeros(1000,1000)[0],big.reshape(1000,1000)[:,3:4]:
        o = to_saved([view])[0]
        assert o.untyped_storage().nbytes()==4*view.numel() and torch.equal(o, view)
    f = io.BytesIO()
    torch.save(to_saved(dict(a=big[:20])), f)
    assert f.tell()<4000

def test_one_memory_as_two_types():
    a = np.ones(10, np.float32)
    t = torch.from_numpy(a)
    assert same(through_a_file([t, t.view(torch.int32), a]), [t, t.view(torch.int32), a])

def test_to_find_out_nothing_is_copied(monkeypatch):
    def copied(*args, **kwargs): raise AssertionError('a copy')
    for o in 'clone','to','cpu','numpy': monkeypatch.setattr(torch.Tensor, o, copied)
    assert is_plain([torch.zeros(10**6)[:-1], torch.ones(1)])

def test_many_small_tensors_are_one_part(tmp_path):
    o = [torch.tensor(float(i)) for i in range(1000)]
    write_file(to_saved(o), tmp_path/'x.pt')
    with zipfile.ZipFile(tmp_path/'x.pt') as z: assert len([n for n in z.namelist() if '/data/' in n])==1
    back = through_a_file(o)
    back[0] += 5
    assert same(back[1:], o[1:]) and back[0].untyped_storage().nbytes()==4

# ---- the folder

def numbered(folder): return sorted(o.name for o in folder.path.glob('checkpoint*'))

def test_arguments(tmp_path):
    for bad in 3,None,[],b'run':
        with pytest.raises(TypeError, match='give a folder'): RunFolder(bad)
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='is a file: give a folder'): RunFolder(tmp_path/'file')
    for bad,err in (0,ValueError),(-1,ValueError),(1.5,TypeError),(True,TypeError),(None,TypeError):
        with pytest.raises(err, match='keep='): RunFolder(tmp_path, keep=bad)
    assert not list(tmp_path.glob('run*')) and len(RunFolder(tmp_path/'run'))==0 and RunFolder(str(tmp_path/'run')) and RunFolder(tmp_path/'run').read() is None

@pytest.mark.parametrize('background', [False,True])
@pytest.mark.parametrize('keep', [1,2,5])
def test_the_last_ones_stay(keep, background, tmp_path):
    run = RunFolder(tmp_path/'new'/'run', keep)
    for i in range(1, 8):
        run.write(dict(i=i), background)
        run.wait()
        assert numbered(run)==[f'checkpoint-{k:06}.pt' for k in range(max(1, i-keep+1), i+1)] and len(run)==min(i, keep)
        assert run.read()==dict(i=i)

def test_numbers_go_on(tmp_path):
    run = RunFolder(tmp_path)
    for i in range(3): run.write(dict(i=i))
    again = RunFolder(tmp_path, keep=3)                                # a restart
    again.write(dict(i=3))
    assert numbered(again)==[f'checkpoint-00000{k}.pt' for k in (2,3,4)] and again.read()==dict(i=3)
    (tmp_path/'checkpoint-000002.pt.pt').write_text('mine')
    (tmp_path/'notes.txt').write_text('mine')
    again.clear()
    assert sorted(o.name for o in tmp_path.iterdir())==['checkpoint-000002.pt.pt','notes.txt'] and len(again)==0 and again.read() is None
    again.write(dict(i=4))
    assert 'checkpoint-000005.pt' in numbered(again)
    os.rename(tmp_path/'checkpoint-000005.pt', tmp_path/'checkpoint-1000000.pt')
    again.write(dict(i=5))
    assert 'checkpoint-1000001.pt' in numbered(again) and again.read()==dict(i=5)

def test_the_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder('run')
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    run.write(dict(i=1))
    assert (tmp_path/'run'/'checkpoint-000001.pt').is_file()

def test_check_writable(tmp_path):
    run = RunFolder(tmp_path/'run')
    run.check_writable()
    assert os.listdir(run.path)==[]
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): RunFolder(tmp_path/'file'/'run').check_writable()

# ---- damage

def damaged_copies(good, tensor, rnd, n):
    "(kind, bytes) of n damaged files; `tensor` is what stands in the file for one"
    at,size = good.index(tensor),len(good)
    other = io.BytesIO()
    torch.save(dict(w=torch.ones(3)), other)
    harmful = io.BytesIO()
    torch.save(Harmful(), harmful)
    for i in range(n):
        data,kind = bytearray(good),i%6
        if kind==0: data = data[:rnd.randrange(size)]
        elif kind==1: data[rnd.randrange(size)] ^= 1<<rnd.randrange(8)
        elif kind==2:
            k = rnd.randrange(size-64)
            data[k:k+64] = bytes(64)
        elif kind==3: data[at+rnd.randrange(len(tensor))] ^= 1<<rnd.randrange(8)
        elif kind==4:
            k = rnd.randrange(size-64)
            data[k:k+64] = rnd.randbytes(64)
        else: data = [other.getvalue(), harmful.getvalue(), b'', b'PK\3\4', rnd.randbytes(100), b'<html>'][i//6%6]
        yield kind,bytes(data)

executed = []
class Harmful:
    def __reduce__(self): return executed.append,('run',)

def test_damaged_files(tmp_path):
    "None is accepted with other numbers, none executed; each message names the file and what to do"
    n = int(os.environ.get('FASTSWA_TEST_DAMAGED', 300))
    rnd,run = random.Random(0),RunFolder(tmp_path)
    state = dict(w=torch.randn(200), a=np.arange(50.), random=random.Random(1).getstate()[1][:30], rates=[.1,.2], step=7)
    run.write(state)
    file,refused = tmp_path/'checkpoint-000001.pt',0
    good = file.read_bytes()
    for kind,data in damaged_copies(good, state['w'].numpy().tobytes(), rnd, n):
        file.write_bytes(data)
        try: assert same(run.read(), state) and data!=good and kind in (1,2,4), kind     # a byte that means nothing, such as padding
        except ValueError as e:
            refused += 1
            assert str(file) in str(e) and 'put an earlier copy' in str(e) and 'fresh=True' in str(e) and 'weights_only' not in str(e), e
    assert not executed and refused>.6*n

def test_a_damaged_newest_one(tmp_path):
    run = RunFolder(tmp_path, keep=3)
    for i in range(3): run.write(dict(i=i))
    run = RunFolder(tmp_path, keep=2)
    for k in 3,2: (tmp_path/f'checkpoint-00000{k}.pt').write_bytes(b'PK')
    with pytest.warns(UserWarning) as ws: assert run.read()==dict(i=0)
    assert len(ws)==1 and ws[0].filename==__file__
    for o in 'checkpoint-000003.pt is damaged','checkpoint-000002.pt is damaged','goes on from the one before, checkpoint-000001.pt': assert o in str(ws[0].message)
    run.write(dict(i=4))            # those that are damaged do not count as kept, and go
    assert numbered(run)==['checkpoint-000001.pt','checkpoint-000004.pt']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run.read()==dict(i=4)
    for o in run.path.glob('checkpoint*'): o.write_bytes(b'')
    with pytest.raises(ValueError, match='000004.pt is damaged.*000001.pt is damaged.*earlier copy.*fresh=True'): run.read()

def test_a_later_format_is_named(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write(dict(i=1))
    monkeypatch.setattr(checkpoint, '_format', checkpoint._format+1)
    run.write(dict(i=2))
    assert run.read()==dict(i=2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match='000002.pt was written by a later fastswa .format 2, this one reads 1.: update fastswa'): run.read()
    assert len(run)==2

def test_no_objects_from_a_file():
    for o in [('array', '|O', [1], torch.zeros(8, dtype=torch.uint8)), ('scalar', '|O', ('bytes','\0'*8)), ('dtype', 'load'), ('eval', '1')]:
        with pytest.raises((ValueError,KeyError)): from_saved(o)

# ---- errors of the disk

def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')

@pytest.mark.parametrize('background', [False,True])
@pytest.mark.parametrize('where', ['fsync','replace','open','save'])
def test_a_full_disk(where, background, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    for i in range(2): run.write(dict(i=i))
    before = {o:o.read_bytes() for o in tmp_path.iterdir()}
    if where=='open':
        monkeypatch.setattr('builtins.open', full)
    elif where=='save':
        real = torch.save
        monkeypatch.setattr(torch, 'save', lambda o,f: (real(o, f), full()))
    else: monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match='No space left'):
        run.write(dict(i=2, w=torch.ones(1000)), background)
        run.wait()
    monkeypatch.undo()
    assert {o:o.read_bytes() for o in tmp_path.iterdir()}==before and run.read()==dict(i=1)
    run.write(dict(i=3), background)
    run.wait()                                             # an error is told once
    assert run.read()==dict(i=3) and len(run)==2

def test_what_cannot_be_saved_is_told_before_anything_is_written(tmp_path):
    run = RunFolder(tmp_path)
    for background in False,True:
        with pytest.raises(TypeError, match=r"state\['a'\]"): run.write(dict(a=print), background)
    assert os.listdir(tmp_path)==[]

def test_a_file_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, keep=1)
    run.write(dict(i=1))
    monkeypatch.setattr(Path, 'unlink', full)
    run.write(dict(i=2))
    assert len(run)==2
    monkeypatch.undo()
    run.write(dict(i=3))
    assert len(run)==1

# ---- in the background

@pytest.fixture
def slow(monkeypatch):
    "torch.save waits until it may go on"
    real,may,begun = torch.save,threading.Event(),threading.Event()
    def save(*args):
        begun.set()
        assert may.wait(20)
        real(*args)
    monkeypatch.setattr(torch, 'save', save)
    save.may,save.begun = may,begun
    yield save
    may.set()

def test_the_background_has_a_copy(slow, tmp_path):
    run,w,a,many = RunFolder(tmp_path),torch.ones(100),np.ones(5),[torch.ones(1) for _ in range(20)]
    state = dict(w=w, v=w[:3], a=a, many=many, table=[1])
    run.write(state, background=True)
    assert slow.begun.wait(20) and len(run)==0
    thread = next(o for o in threading.enumerate() if o is run._thread)
    assert not thread.daemon                               # Python waits for it before it ends
    for o in w,a,*many: o += 1
    state['table'].append(2)
    slow.may.set()
    back = run.read()                                      # waits
    assert same(back, dict(w=torch.ones(100), v=torch.ones(3), a=np.ones(5), many=[torch.ones(1)]*20, table=[1]))

def test_one_waits_for_the_other(slow, tmp_path):
    run,done = RunFolder(tmp_path),[]
    run.write(dict(i=1), background=True)
    second = threading.Thread(target=lambda: (run.write(dict(i=2)), done.append(2)))
    second.start()
    time.sleep(.1)
    assert not done and len(run)==0
    slow.may.set()
    second.join(20)
    assert done and numbered(run)==['checkpoint-000001.pt','checkpoint-000002.pt'] and run.read()==dict(i=2)

def test_an_error_in_the_background_is_told_by_the_next_call(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    for background in False,True:
        monkeypatch.setattr(os, 'fsync', full)
        run.write(dict(i=1), background=True)
        run._thread.join()
        monkeypatch.undo()
        with pytest.raises(OSError, match='No space left'): run.write(dict(i=background), background)
        run.wait()
        assert run.read()==dict(i=background)              # the next call did what it is for

def test_unlock_waits(slow, tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    run.write(dict(i=1), background=True)
    threading.Timer(.1, slow.may.set).start()
    run.unlock()
    assert len(run)==1

def test_python_ends_when_it_is_written(tmp_path):
    def child():
        save = torch.save
        torch.save = lambda *args: (time.sleep(.3), save(*args))
        RunFolder(tmp_path).write(dict(w=torch.ones(10**6)), background=True)
    p = fork.Process(target=child)
    p.start()
    p.join()
    assert torch.equal(RunFolder(tmp_path).read()['w'], torch.ones(10**6))

# ---- killed

def write_for_ever(path, background):
    run = RunFolder(path)
    run.lock()
    state = run.read() or dict(i=0)
    i = state['i']
    while True:
        i += 1
        run.write(dict(i=i, w=torch.full((5000,), float(i)), a=np.full(10, i)), background)

def whole(run, last):
    "The number of the newest state, after somebody was killed: a whole one, and not an older one than before"
    with warnings.catch_warnings():
        warnings.simplefilter('error')                     # not even the newest is damaged
        state = run.read()
    i = state['i']
    assert i>=last and torch.equal(state['w'], torch.full((5000,), float(i))) and (state['a']==i).all()
    return i

@pytest.mark.parametrize('background', [False,True])
def test_killed_while_it_writes(background, tmp_path):
    rnd,run,last = random.Random(0),RunFolder(tmp_path),0
    for k in range(int(os.environ.get('FASTSWA_TEST_KILLED', 12))):
        child = fork.Process(target=write_for_ever, args=(tmp_path, background))
        child.start()
        end = time.time()+20
        while not len(run) and time.time()<end: time.sleep(.001)
        time.sleep(.01+.04*rnd.random())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode==-signal.SIGKILL
        last = whole(run, last)
    run.lock()
    assert not list(tmp_path.glob('*.tmp'))                # what killed writers left is gone
    run.unlock()

def killed_at_line(path, n):
    "Write once more, killed before the n-th line of what writes"
    def trace(frame, event, arg):
        if frame.f_code.co_name not in ('_store','write_file','replace_file','write','_sync_folder'): return
        if event=='line': lines.append(frame.f_lineno)
        if len(lines)==n: os.kill(os.getpid(), signal.SIGKILL)
        return trace
    lines,run = [],RunFolder(path)
    run.lock()
    i = run.read()['i']+1
    sys.settrace(trace)
    run.write(dict(i=i, w=torch.full((5000,), float(i)), a=np.full(10, i)))
    sys.settrace(None)

def test_killed_at_each_line(tmp_path):
    run,last,n,left = RunFolder(tmp_path),1,1,0
    for i in range(2): run.write(dict(i=i, w=torch.full((5000,), float(i)), a=np.full(10, i)))
    while True:
        child = fork.Process(target=killed_at_line, args=(tmp_path, n))
        child.start()
        child.join()
        left += len(list(tmp_path.glob('*.tmp')))
        last = whole(run, last)
        if child.exitcode==0: break
        assert child.exitcode==-signal.SIGKILL
        n += 1
    assert n>20 and left and len(run)==2                 # the one that was let live has tidied up
    assert not list(tmp_path.glob('*.tmp'))

def test_leftovers_go_when_the_folder_is_ours(tmp_path):
    run,other = RunFolder(tmp_path),RunFolder(tmp_path)
    run.write(dict(i=1))
    for o in 'checkpoint-000002.pt.0123456789ab.tmp','mine.tmp': (tmp_path/o).write_text('')
    run.lock()
    assert sorted(o.name for o in tmp_path.iterdir())==['checkpoint-000001.pt','lock','mine.tmp']
    (tmp_path/'checkpoint-000002.pt.0123456789ab.tmp').write_text('')
    with pytest.raises(RuntimeError): other.lock()
    run.lock()
    assert len(list(tmp_path.glob('checkpoint*.tmp')))==1  # might be what we are writing
    run.unlock()

# ---- the lock

def taken(path):
    "None if another process can lock the folder, else what it is told"
    def ask(to):
        run = RunFolder(path)
        try: to.send(run.lock())
        except BaseException as e: to.send(f'{type(e).__name__}: {e}')
        os._exit(0)
    here,there = fork.Pipe()
    child = fork.Process(target=ask, args=(there,))
    child.start()
    assert here.poll(20)
    res = here.recv()
    child.join()
    return res

def test_one_run_in_a_folder(tmp_path):
    run,other = RunFolder(tmp_path/'run'),RunFolder(tmp_path/'run'/'..'/'run')
    os.symlink(tmp_path/'run', tmp_path/'link')
    run.lock()
    run.lock()
    for o in other,RunFolder(tmp_path/'link'):
        with pytest.raises(RuntimeError, match=f'in use by another Resume of this process .{os.getpid()}.*folder of its own'): o.lock()
        o.unlock()                                         # nothing of it
    said = taken(tmp_path/'run')
    assert said.startswith('RuntimeError') and f'in use by process {os.getpid()} on ' in said and 'end it' in said
    assert taken(tmp_path/'link') and taken(tmp_path/'other') is None
    run.unlock()
    run.unlock()
    assert taken(tmp_path/'run') is None
    other.lock()
    assert taken(tmp_path/'run')
    other.unlock()

def test_a_forked_process_has_it_not(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    def child(to):
        try: to.send(str(run.lock()))                      # the object says it has it; the process has not
        except RuntimeError as e: to.send(str(e))
        run.unlock()
        to.close()
        sys.exit()
    here,there = fork.Pipe()
    p = fork.Process(target=child, args=(there,))
    p.start()
    assert here.poll(20) and f'process {os.getpid()}' in here.recv()
    p.join()
    assert taken(tmp_path)
    run.unlock()

def test_the_dead_hold_nothing(tmp_path):
    "Not even through workers that were forked and live on"
    def holder(to):
        run = RunFolder(tmp_path)
        run.lock()
        worker = os.fork()
        if worker==0:
            time.sleep(60)
            os._exit(0)
        to.send(worker)
        time.sleep(60)
    here,there = fork.Pipe()
    p = fork.Process(target=holder, args=(there,))
    p.start()
    assert here.poll(20)
    worker = here.recv()
    try:
        assert f'process {p.pid} on ' in taken(tmp_path)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        os.kill(worker, 0)                                 # it lives
        assert taken(tmp_path) is None
    finally: os.kill(worker, signal.SIGKILL)

def test_a_folder_nobody_has_any_more(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    del run                                                # an exception ended the fit, say
    assert taken(tmp_path) is None
    other = RunFolder(tmp_path)
    other.lock()
    assert taken(tmp_path)
    other.unlock()

def test_the_lock_survives_what_a_run_does(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    run.check_writable()
    for background in False,True: run.write(dict(i=1), background)
    run.wait()
    run.read()
    len(run)
    run.clear()
    with pytest.raises(RuntimeError): RunFolder(tmp_path).lock()
    assert taken(tmp_path)
    run.unlock()

def test_without_locks(tmp_path, monkeypatch):
    "A file system that has none is told of, and used"
    def none(*args): raise OSError(errno.ENOTSUP, 'Operation not supported')
    monkeypatch.setattr(checkpoint.fcntl, 'lockf', none)
    run = RunFolder(tmp_path)
    with pytest.warns(UserWarning, match='without locks.*no second run'): run.lock()
    run.write(dict(i=1))
    run.unlock()
    assert run.read()==dict(i=1)
