"What every module needs: Ctrl-C that waits, whole files, plain numbers"
import math, os, signal, stat, subprocess, sys, textwrap, threading, warnings
from fractions import Fraction

import numpy as np, pytest, torch
from fastswa.utils import check_writable, is_int, is_num, plain_number, read_file, uninterrupted, warn_user, write_file

def sigint(n=1):
    for _ in range(n): signal.raise_signal(signal.SIGINT)

# ---- Ctrl-C

def done(*blocks, n=1, check=False):
    "What is still done of two nested blocks when `n` Ctrl-C come in the inner one"
    res = []
    try:
        with uninterrupted(blocks[0]):
            with uninterrupted(blocks[1]) as ask:
                sigint(n)
                res.append('inner')
                if check: ask()
                res.append('checked')
            res.append('outer')
    except KeyboardInterrupt: res.append('Ctrl-C')
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return res

@pytest.mark.parametrize('blocks,n,check,want', [
    ((None,None), 1, False, ['inner','checked','outer','Ctrl-C']), ((None,None), 9, False, ['inner','checked','outer','Ctrl-C']),
    ((None,1), 1, True, ['inner','Ctrl-C']), ((1,1), 1, True, ['inner','Ctrl-C']), ((1,None), 5, False, ['inner','checked','outer','Ctrl-C']),
    ((1,1), 2, False, ['Ctrl-C']), ((None,1), 2, False, ['Ctrl-C']), ((1,1), 0, True, ['inner','checked','outer'])])
def test_ctrl_c_waits(blocks, n, check, want): assert done(*blocks, n=n, check=check)==want

def test_an_error_in_the_block_and_ctrl_c():
    with pytest.raises(KeyboardInterrupt) as e:
        with uninterrupted():
            sigint()
            raise ValueError('first')
    assert isinstance(e.value.__context__, ValueError)
    with pytest.raises(ValueError):
        with uninterrupted(): raise ValueError('alone')

def test_a_handler_of_ones_own_is_called_once_and_later():
    seen,old = [],signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *args: seen.append(args[0]))
    try:
        with uninterrupted() as check:
            sigint(3)
            assert not seen
            check()
            assert seen==[signal.SIGINT]
        assert len(seen)==1
        with uninterrupted(): sigint()
        assert len(seen)==2
    finally: signal.signal(signal.SIGINT, old)

def test_in_another_thread_it_does_nothing():
    seen = []
    def go():
        with uninterrupted() as check: seen.append(check())
    t = threading.Thread(target=go)
    t.start()
    t.join()
    assert seen==[None]

def test_where_ctrl_c_is_ignored():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted() as check:
            sigint()
            check()
        assert signal.getsignal(signal.SIGINT)==signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, old)

# ---- files

def test_a_file_is_as_readable_as_any_other(tmp_path):
    write_file(dict(a=1), tmp_path/'x.pt')
    (tmp_path/'y').write_text('')
    assert stat.S_IMODE(os.stat(tmp_path/'x.pt').st_mode)==stat.S_IMODE(os.stat(tmp_path/'y').st_mode)

@pytest.mark.parametrize('at', ['fsync','replace'])
@pytest.mark.parametrize('exc', [OSError(28,'No space left on device'), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(at, exc, tmp_path, monkeypatch):
    file = tmp_path/'x.pt'
    write_file(dict(a=1), file)
    def fail(*args): raise exc
    monkeypatch.setattr(os, at, fail)
    with pytest.raises(type(exc)): write_file(dict(a=2), file)
    monkeypatch.undo()
    assert read_file(file)==dict(a=1) and os.listdir(tmp_path)==['x.pt']

def test_a_full_device_is_an_os_error(tmp_path, monkeypatch):
    "torch calls it a RuntimeError"
    def fail(*args): raise RuntimeError('PytorchStreamWriter failed writing file')
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='x.pt.*failed writing'): write_file({}, tmp_path/'x.pt')
    assert not os.listdir(tmp_path)

def test_killed_while_it_writes(tmp_path):
    "The old file is whole whenever the process dies"
    code = f"""
        import os, torch; from fastswa.utils import write_file
        write_file(dict(w=torch.ones(10)), {str(tmp_path/'x.pt')!r})
        real = os.fsync
        os.fsync = lambda fd: os._exit(9)
        write_file(dict(w=torch.zeros(10)), {str(tmp_path/'x.pt')!r})"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert r.returncode==9, r.stderr
    assert torch.equal(read_file(tmp_path/'x.pt')['w'], torch.ones(10))

@pytest.mark.parametrize('mmap', [False,True])
def test_mapped_files_are_checked_too(mmap, tmp_path):
    file = tmp_path/'x.pt'
    write_file(dict(w=torch.arange(1000.)), file)
    assert torch.equal(read_file(file, mmap)['w'], torch.arange(1000.))
    data = bytearray(file.read_bytes())
    data[data.index(torch.arange(1000.).numpy().tobytes())+2000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match='x.pt cannot be read.*checksum'): read_file(file, mmap)

def test_check_writable(tmp_path):
    check_writable(tmp_path/'new'/'x.pt')
    assert os.listdir(tmp_path/'new')==[]
    (tmp_path/'x.pt').write_text('kept')
    check_writable(tmp_path/'x.pt')
    assert (tmp_path/'x.pt').read_text()=='kept'
    for bad in (tmp_path, tmp_path/'x.pt'/'y.pt'):
        with pytest.raises(OSError): check_writable(bad)

# ---- warnings and numbers

def test_a_warning_comes_each_time_and_from_here():
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('default')
        for _ in range(2): warn_user('again')
    assert len(ws)==2 and {w.filename for w in ws}=={__file__}

@pytest.mark.parametrize('o,want', [(Fraction(1,2),.5), (np.array(3),3), (np.float32(.5),.5), (torch.tensor(2),2), (torch.tensor(.5),.5), (True,True), (np.bool_(True),True), (None,None), ('a','a'), (np.uint8(7),7)])
def test_plain_number(o, want):
    got = plain_number(o)
    assert got==want and type(got) is type(want)

def test_what_is_a_number():
    assert all(map(is_num, (1, .5, Fraction(1,3), np.array(1.), np.int64(2))))
    assert not any(map(is_num, (True, math.nan, float('inf'), None, 'x', np.ones(1), np.array(True), 1j)))
    assert all(map(is_int, (1, np.int8(1), np.array(2), torch.tensor(3)))) and not any(map(is_int, (1., True, Fraction(4,1), np.array(2.))))

