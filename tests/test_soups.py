"Soups: the mean of files is the mean, the greedy one takes what can be worked out by hand, and what has no mean is refused"
import os, pickle, signal, subprocess, sys

import pandas as pd, pytest, torch
from torch import nn
from common import *
from fastswa import commands, soups
from fastswa.learner import measure_bn
from fastswa.soups import average_files, main

class One(nn.Module):
    "One weight w, and f(w) as its prediction"
    def __init__(self, w=0., f=lambda w: w, dtype=torch.float32):
        super().__init__()
        self.w,self.f = nn.Parameter(torch.tensor([w], dtype=dtype)),f
    def forward(self, x): return self.f(self.w)*x

def one_learner(tmp_path, f=lambda w: w, targets=(0.,0.), valid=True, dtype=torch.float32):
    "Inputs are 1, and batches of two have these targets: a weight w has the mean of (f(w)-target)**2 as its loss"
    items = [(torch.ones(1, dtype=dtype),torch.tensor([y], dtype=dtype)) for y in targets for _ in range(2)]
    loaders = [FastaiDataLoader(items, bs=2) for _ in range(1+valid)]
    return Learner(DataLoaders(*loaders), One(f=f, dtype=dtype), loss_func=MSELossFlat(), opt_func=sgd, lr=.1, path=tmp_path)

def write(tmp_path, **ws):
    for k,w in ws.items(): torch.save(dict(w=torch.tensor([float(w)])), tmp_path/f'{k}.pth')
    return [str(tmp_path/f'{k}.pth') for k in ws]

def soup(learn, files, *args, **kw):
    with quiet(learn): df = average_files(files, learn, *args, **kw)
    return df.assign(file=[Path(o).stem for o in df.file])

def w_of(learn): return learn.model.w.item()

def three(tmp_path, model=None, **kw):
    "A learner in whose folder are three files of its fit: of the callback, with an optimizer, of torch.save"
    l = learner(model, path=tmp_path, shuffle=False, **kw)
    fit(l, 2, cbs=SaveModelCallback(every_epoch=2))
    states = [torch.load(tmp_path/'models'/'model_0.pth', weights_only=True)]
    fit(l, 1); l.save('with_opt'); states.append(state(l.model))
    fit(l, 1); torch.save(l.model.state_dict(), tmp_path/'plain.pt'); states.append(state(l.model))
    fit(l, 1)
    return l,['model_0', 'with_opt', tmp_path/'plain.pt'],states

def by_hand(states, k): return torch.stack([o[k].double() for o in states]).mean(0)

# ---- the mean

@pytest.mark.parametrize('model', [net, plain_net])
def test_uniform_is_the_mean(tmp_path, model):
    l,files,states = three(tmp_path, model(), bs=200)          # one batch: the table joins small ones
    opt = [p.clone() for p in l.opt.state[next(iter(l.model.parameters()))].values() if isinstance(p, torch.Tensor)]
    ints = {k:v.clone() for k,v in l.model.named_buffers() if not v.is_floating_point()}
    df = soup(l, files, barrier=None, n_train=None, n_valid=None)
    assert all(torch.equal(v, l.model.get_buffer(k)) for k,v in ints.items())      # other buffers are the model's own
    for k,p in l.model.named_parameters(): torch.testing.assert_close(p.double(), by_hand(states, k), atol=1e-7, rtol=1e-6)
    assert df.columns.tolist()==['file','loss','soup','taken'] and df.taken.all() and df.file.tolist()==['model_0','with_opt','plain']
    assert df.soup[0]==df.loss[0]
    own = state(l.model)
    with quiet(l):
        assert l.validate()[0]==pytest.approx(df.soup.iloc[-1], abs=1e-6)       # all data were looked at, so the table's last is exact
        l.update_bn()                                                           # and nothing is left to measure
    for k,v in state(l.model).items(): torch.testing.assert_close(v, own[k], atol=1e-6, rtol=1e-5)
    now = [p for p in l.opt.state[next(iter(l.model.parameters()))].values() if isinstance(p, torch.Tensor)]
    assert len(now)==len(opt)>0 and same(now, opt)
    for f,o in zip(df.file, states):
        l.model.load_state_dict(o)
        with quiet(l):
            l.update_bn()
            assert l.validate()[0]==pytest.approx(df.set_index('file').loss[f], abs=1e-6)

def test_statistics_are_of_all_training_data(tmp_path):
    l,files,_ = three(tmp_path)
    soup(l, files, barrier=None, n_train=40, n_valid=64)
    want = measure_bn(l, [l.model[1], l.model[4]])
    for m,mean,var in zip(want.layers, want.means, want.vars):
        torch.testing.assert_close(m.running_mean, mean); torch.testing.assert_close(m.running_var, var)

def test_frozen_weights_stay_to_the_bit(tmp_path):
    l = learner(plain_net(), path=tmp_path)
    l.model[1].requires_grad_(False)
    frozen = l.model[1].weight.clone()
    for i in range(3): fit(l, 1); l.save(f'f{i}')
    soup(l, ['f0','f1','f2'])
    assert torch.equal(l.model[1].weight, frozen)

def test_half_precision(tmp_path):
    l = one_learner(tmp_path, dtype=torch.bfloat16)
    vals = [1., 1.0078125, 1.015625, 1.0078125, 1.0078125, 1.0078125, 1.015625]      # a step of bfloat16 apart
    for i,v in enumerate(vals): torch.save(dict(w=torch.tensor([v], dtype=torch.bfloat16)), tmp_path/f'{i}.pth')
    soup(l, [tmp_path/f'{i}.pth' for i in range(7)])
    assert l.model.w.dtype==torch.bfloat16 and torch.equal(l.model.w.detach(), torch.tensor(vals).mean().bfloat16()[None])
    main([*[str(tmp_path/f'{i}.pth') for i in range(7)], '--out', str(tmp_path/'c.pth')])
    assert torch.equal(torch.load(tmp_path/'c.pth')['w'], l.model.w.detach())

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4,4),nn.Linear(4,4)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x.flatten(1)[:,:4]))

def test_tied(tmp_path):
    l = learner(Tied(), path=tmp_path, metrics=None)
    l.loss_func = lambda o,y: o.square().mean()
    for i in range(2): fit(l, 1); l.save(f'f{i}', with_opt=False)
    states = [torch.load(tmp_path/'models'/f'f{i}.pth') for i in range(2)]
    soup(l, ['f0','f1'])
    assert l.model.a.weight is l.model.b.weight
    torch.testing.assert_close(l.model.a.weight.double(), by_hand(states, 'a.weight'), atol=1e-7, rtol=1e-6)
    main([*[str(tmp_path/'models'/f'f{i}.pth') for i in range(2)], '--out', str(tmp_path/'models'/'c.pth')])
    c = torch.load(tmp_path/'models'/'c.pth')
    assert c['a.weight'].data_ptr()==c['b.weight'].data_ptr() and c['a.bias'].data_ptr()!=c['b.bias'].data_ptr()
    kept = state(l.model)
    l.load('c', with_opt=False)
    assert same(state(l.model), kept)

def test_tied_in_some_files_only(tmp_path):
    w = torch.ones(3)
    torch.save(dict(a=w, b=w), tmp_path/'x.pth'); torch.save(dict(a=w, b=3*w), tmp_path/'y.pth')
    for order in 'xy','yx':
        m = soups.mean_state([tmp_path/f'{o}.pth' for o in order])
        assert torch.equal(m['a'], w) and torch.equal(m['b'], 2*w)

# ---- greedy

def test_greedy_takes_what_can_be_worked_out(tmp_path):
    l = one_learner(tmp_path)
    df = soup(l, write(tmp_path, d=-3, b=-1.2, a=1, c=2, e=1.9), greedy=True)
    # a: 1; with b: (1-1.2)/2; with e, c or d: what three make
    want = pd.DataFrame(dict(file=[*'abecd'], loss=[1,1.44,3.61,4,9], soup=[1, .01, (1.7/3)**2, .36, (3.2/3)**2], taken=[True,True,False,False,False]))
    pd.testing.assert_frame_equal(df, want, check_dtype=False, rtol=1e-5)
    assert w_of(l)==pytest.approx(-.1, abs=1e-6)
    df = soup(l, write(tmp_path, a=1, b=1, c=-4), greedy=True)
    assert df.taken.tolist()==[True,True,True] and df.soup.tolist()==pytest.approx([1,1,4/9]) and w_of(l)==pytest.approx(-2/3)   # not worse is enough

def test_greedy_goes_by_validation_data(tmp_path):
    l = one_learner(tmp_path, targets=(5.,0.))                 # of batches that are spread, the last one is among the first n
    a = soup(l, write(tmp_path, a=1, b=4), greedy=True, n_valid=1)
    assert a.loss.tolist()==pytest.approx([1,16]) and a.taken.tolist()==[True,False]
    b = soup(l, write(tmp_path, a=1, b=4), greedy=True)
    assert b.loss.tolist()==pytest.approx([(16+1)/2, (1+16)/2]) and b.taken.all() and w_of(l)==2.5
    l.dls.loaders[1] = FastaiDataLoader([(torch.ones(1),torch.tensor([4.]))], bs=1)
    assert soup(l, write(tmp_path, a=1, b=4), greedy=True).file.tolist()==['b','a'] and w_of(l)==4

def test_without_validation_data(tmp_path):
    l = one_learner(tmp_path, targets=(5.,0.), valid=False)
    before = w_of(l)
    with pytest.raises(ValueError, match='greedy=True: this learner has no validation data'): soup(l, write(tmp_path, a=1, b=4), greedy=True)
    assert w_of(l)==before
    assert soup(l, write(tmp_path, a=1, b=4)).loss.tolist()==pytest.approx([8.5,8.5]) and w_of(l)==2.5
    assert soup(l, write(tmp_path, a=1, b=4), n_train=1).loss.tolist()==pytest.approx([16,1])        # the first training batch

@pytest.mark.parametrize('s', range(3))
def test_never_worse_than_the_best_file(tmp_path, s):
    l = learner(path=tmp_path, shuffle=False, s=s, bs=200)
    fit(l, 1)
    for i in range(5):
        sd,g = state(l.model),torch.Generator().manual_seed(10*s+i)
        for k,p in l.model.named_parameters(): sd[k] = p.detach()+.4*p.detach().abs().mean()*torch.randn(p.shape, generator=g)
        torch.save(sd, tmp_path/f'{i}.pth')
    df = soup(l, [tmp_path/f'{i}.pth' for i in range(5)], greedy=True, n_train=None, n_valid=None)
    took = df[df.taken]
    assert df.loss.is_monotonic_increasing and took.soup.is_monotonic_decreasing and took.soup.iloc[0]==df.loss[0]
    assert (df.soup[~df.taken]>took.soup.iloc[-1]).all() or not df.taken.all()
    with quiet(l): assert l.validate()[0]==pytest.approx(took.soup.iloc[-1], abs=1e-5)

# ---- barriers

def well(w): return w*w-1                                     # with target 0 the loss is (w*w-1)**2: two valleys, at -1 and 1

def test_refused_with_the_number(tmp_path):
    l = one_learner(tmp_path, well)
    files = write(tmp_path, a=1.2, b=-1.2, c=1.)
    with pytest.raises(ValueError, match=r'a\.pth and .*b\.pth have no mean.*rises by 0\.806 \(from 0\.194 and 0\.194\).*greedy=True.*barrier=None'): soup(l, files)
    assert w_of(l)==0 and (tmp_path/'a.pth').exists()
    with pytest.raises(ValueError, match='c.pth and .*b.pth have no mean'): soup(l, files[::-2]+files[1:2])      # the first and each other
    df = soup(l, files, barrier=None)
    assert w_of(l)==pytest.approx(1/3) and 'barrier' not in df
    assert not soup(l, files, greedy=True).taken.all()

def test_barrier_is_the_rise_over_the_line_between_the_ends(tmp_path):
    l = one_learner(tmp_path, well)
    L = lambda w: (w*w-1)**2
    for a,b in ((1.2,-1.2),(1.3,-.9),(.2,1.)):
        ws = [(t/6,a+(b-a)*t/6) for t in range(1,6)]
        want = max(0, *(L(w)-(1-t)*L(a)-t*L(b) for t,w in ws))
        files = write(tmp_path, a=a, b=b)
        df = soup(l, files, barrier=1e9)
        assert df.barrier.tolist()==pytest.approx([0,want], abs=1e-5) and df.columns.tolist()==['file','loss','barrier','soup','taken']
        assert w_of(l)==pytest.approx((a+b)/2, abs=1e-6)
        share = want/max(L(a),L(b))
        if want: 
            soup(l, files, barrier=share*1.01)
            with pytest.raises(ValueError, match='no mean'): soup(l, files, barrier=share*.99)

def test_not_a_number_on_the_line(tmp_path):
    l = one_learner(tmp_path, lambda w: w*(1/w))               # 0 times infinity, halfway
    l.model.w.data.fill_(1.)
    with pytest.raises(ValueError, match='rises by nan'): soup(l, write(tmp_path, a=1, b=-1))

# ---- what is wrong, and what is left alone

def test_errors(tmp_path):
    l = one_learner(tmp_path)
    a,b = write(tmp_path, a=1, b=2)
    def refused(msg, files, exc=ValueError, **kw):
        with pytest.raises(exc, match=msg): soup(l, files, **kw)
        assert w_of(l)==0
    refused(r"files=\['model'\]: give two or more", 'model')
    refused('give two or more', [a])
    refused('no such file: neither', [a,'nothing'])
    refused('barrier=-1: give a finite number, 0 or more', [a,b], barrier=-1)
    refused("barrier='x': give a number", [a,b], exc=TypeError, barrier='x')
    refused('n_valid=0', [a,b], n_valid=0)
    torch.save(dict(w=torch.tensor([math.nan])), tmp_path/'n.pth')
    refused('n.pth has weights that are not finite', [a,tmp_path/'n.pth'])
    torch.save(dict(v=torch.ones(1)), tmp_path/'v.pth')
    refused('v.pth is of another architecture', [a,tmp_path/'v.pth'])
    (tmp_path/'cut.pth').write_bytes(Path(a).read_bytes()[:200])
    refused('cut.pth cannot be read', [a,tmp_path/'cut.pth'])
    assert soup(l, (o for o in (a,b))).taken.all() and w_of(l)==1.5             # any iterable

def test_interrupted(tmp_path):
    l,files,_ = three(tmp_path)
    before,calls = state(l.model),[]
    def forward(*_):
        calls.append(1)
        if len(calls)==stop: signal.raise_signal(signal.SIGINT)
    h = l.model.register_forward_pre_hook(forward)
    stop = 0
    soup(l, files, barrier=None)
    total = len(calls)
    for stop in 2,total//2,total-1:                            # among the files, and while the last statistics are measured
        l.model.load_state_dict(before); calls.clear()
        with pytest.raises(KeyboardInterrupt): soup(l, files, barrier=None)
        assert same(state(l.model), before)
    h.remove()

# ---- the command

def run(capsys, *args):
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    out,err = capsys.readouterr()
    assert e.value.code==2 and out=='' and err.count('\n')==1 and err.startswith('fastswa_average: ')
    return err

def test_round_trip(tmp_path, capsys):
    l,files,states = three(tmp_path)
    paths = [tmp_path/'models'/'model_0.pth', tmp_path/'models'/'with_opt.pth', tmp_path/'plain.pt']
    soup(l, files, barrier=None)
    want = state(l.model)
    assert main([*map(str, paths), '--out', str(tmp_path/'models'/'c.pth')]) is None
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path/'models'/'c.pth'}: the mean of 3 files") and 'learn.update_bn()' in out
    c = torch.load(tmp_path/'models'/'c.pth', weights_only=True)
    assert list(c)==list(states[0])
    for k,v in c.items():
        assert v.dtype==states[-1][k].dtype
        if v.is_floating_point(): torch.testing.assert_close(v.double(), by_hand(states, k), atol=1e-6, rtol=1e-6)   # statistics too
        else: assert v==states[-1][k]!=states[0][k]             # batches seen: the last file's
    l.load('c', with_opt=False)
    with quiet(l): l.update_bn()
    for k,v in state(l.model).items():
        if v.is_floating_point(): torch.testing.assert_close(v, want[k], atol=1e-6, rtol=1e-5)

def test_no_word_of_batchnorm_without_it(tmp_path, capsys):
    main([*write(tmp_path, a=1, b=2), '--out', str(tmp_path/'new'/'c.pth')])
    assert 'BatchNorm' not in capsys.readouterr().out and torch.load(tmp_path/'new'/'c.pth')['w'].item()==1.5

def test_command_refuses(tmp_path, capsys):
    a,b = write(tmp_path, a=1, b=2)
    c = tmp_path/'c.pth'
    assert 'two files or more' in run(capsys, a, '--out', c)
    assert '--out' in run(capsys, a, b)
    torch.save(dict(w=torch.ones(2)), tmp_path/'s.pth'); torch.save(dict(w=torch.ones(1), v=torch.ones(1)), tmp_path/'m.pth')
    assert f"{a} and {tmp_path/'s.pth'} are of different architectures: w is (1,), then (2,)" in run(capsys, a, tmp_path/'s.pth', '--out', c)
    assert f"{a} and {tmp_path/'m.pth'} are of different architectures: v is missing, then (1,)" in run(capsys, a, tmp_path/'m.pth', '--out', c)
    assert 'v is (1,), then missing' in run(capsys, tmp_path/'m.pth', a, '--out', c)
    torch.save(dict(w=torch.tensor([math.inf])), tmp_path/'i.pth')
    assert 'i.pth has weights that are not finite' in run(capsys, a, tmp_path/'i.pth', '--out', c)
    torch.save(dict(w=1), tmp_path/'n.pth')
    assert 'n.pth holds no state_dict' in run(capsys, a, tmp_path/'n.pth', '--out', c)
    assert 'No such file' in run(capsys, a, tmp_path/'nothing.pth', '--out', c)
    (tmp_path/'cut.pth').write_bytes(Path(a).read_bytes()[:200])
    assert 'cut.pth cannot be read' in run(capsys, a, tmp_path/'cut.pth', '--out', c)
    assert str(tmp_path) in run(capsys, a, b, '--out', tmp_path, '--force') and not c.exists()

def test_files_there_are_safe(tmp_path, capsys, monkeypatch):
    a,b = write(tmp_path, a=1, b=2)
    assert 'is there already: --force' in run(capsys, a, b, '--out', b)
    def full(*_): raise OSError('no space left')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        assert 'no space left' in run(capsys, a, b, '--out', b, '--force')
    assert torch.load(b)['w'].item()==2 and sorted(o.name for o in tmp_path.iterdir())==['a.pth','b.pth']
    main([a, b, '--out', b, '--force'])                         # one of those that are read, even
    assert torch.load(b)['w'].item()==1.5

class Evil:
    def __reduce__(self): return os.mkdir,('was_here',)

def test_nothing_is_executed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(w=Evil()), 'evil.pth')
    a, = write(tmp_path, a=1)
    assert 'more than tensors and numbers' in run(capsys, 'evil.pth', a, '--out', 'c.pth') and not Path('was_here').exists()

def test_interrupted_command(monkeypatch, capsys):
    def stop(): raise KeyboardInterrupt
    monkeypatch.setattr(soups, 'main', stop)
    assert commands.average()==130 and capsys.readouterr().err=='\nfastswa_average: interrupted\n'

def test_in_a_process_of_its_own(tmp_path):
    files = write(tmp_path, a=1, b=2)
    def call(*args): return subprocess.run([sys.executable, '-c', 'import sys; from fastswa.commands import average; sys.exit(average())', *args], capture_output=True, text=True, cwd=tmp_path)
    r = call('a.pth', 'b.pth', '--out', 'c.pth')
    assert (r.returncode,r.stderr)==(0,'') and r.stdout.startswith('c.pth: the mean of 2 files') and torch.load(tmp_path/'c.pth')['w'].item()==1.5

def test_help(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    out = capsys.readouterr().out
    assert e.value.code==0 and all(o in out for o in ('FILE [FILE ...]','--out FILE','--force','--version'))
