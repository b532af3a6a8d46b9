"The demo: its data, its numbers, what it says about them, its picture and its command line"
import os,subprocess,sys
from collections import Counter
from pathlib import Path

import numpy as np,pytest,torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastswa import demo
from fastswa.demo import Run,demo_dls,demo_learner,demo_split,fit_run,main,plot,random_shift,run_seed,table,verdict,walk_plane,wrong_labels
from fastswa.callback import SWA
from fastswa.ensemble import FGE,SnapshotEnsemble
from fastswa.schedule import sched_authors,swa_cycles

root,n_epoch = Path(__file__).resolve().parent.parent,8
d = load_digits()
X,Y = torch.tensor(d.images/16, dtype=torch.float32)[:,None],torch.tensor(d.target)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As the command has it, whose numbers are compared with those of its functions"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def runs(): return run_seed(0, n_epoch)

def made_up(method, accs, losses, train=.7, **kw): return [Run(method, dict(accuracy=a, test_loss=l, train_loss=train), **kw) for a,l in zip(accs,losses)]

# Data

@pytest.mark.parametrize('seed', [0,1,100])
def test_split(seed):
    train,test = demo_split(seed)
    assert len(train)==500 and sorted([*train,*test])==list(range(len(Y)))
    for k,n in Counter(Y[train].tolist()).items(): assert abs(n-500*(Y==k).float().mean())<=1

@pytest.mark.parametrize('seed', [0,1,100])
def test_exactly_a_fifth_is_wrong(seed):
    train,test = demo_split(seed)
    dls = demo_dls(seed)
    for i in 0,2:
        x,y = dls[i].dataset.tensors
        assert torch.equal(x, X[train]) and (y!=Y[train]).sum()==100 and 0<=y.min() and y.max()<=9
    x,y = dls.valid.dataset.tensors
    assert torch.equal(x, X[test]) and torch.equal(y, Y[test])

def test_wrong_labels_spread():
    y = torch.arange(1000)%10
    noisy = wrong_labels(y, 3, .4)
    assert torch.equal(y, torch.arange(1000)%10)   # the argument is left alone
    bad = y!=noisy
    assert bad.sum()==400 and len(set(((noisy-y)%10)[bad].tolist()))==9 and not torch.equal(noisy, wrong_labels(y, 4, .4))

def test_batches():
    dls = demo_dls(5)
    seen = [y for _,y in dls.train]
    assert [len(o) for o in seen]==[50]*10
    assert torch.equal(torch.cat(seen).sort().values, dls[2].dataset.tensors[1].sort().values)   # every picture once
    assert not torch.equal(torch.cat(seen), torch.cat([y for _,y in dls.train]))                 # in another order each epoch
    x,y = dls[2].one_batch()
    assert torch.equal(x, dls[2].dataset.tensors[0])                                             # what is measured is not shifted

def test_shift():
    x = torch.rand(300,1,8,8)
    ref = F.pad(x, (1,)*4)
    places = Counter()
    for o,r in zip(random_shift((x,None))[0], ref):
        at = [(i,j) for i in range(3) for j in range(3) if torch.equal(o, r[:,i:i+8,j:j+8])]
        assert len(at)==1
        places[at[0]] += 1
    assert len(places)==9 and min(places.values())>10

# Numbers

def test_table_is_what_the_learners_do(runs):
    lines = table(runs).splitlines()
    assert lines[0].split('   ')[-1]=='forward passes' and len(lines)==6 and len(set(map(len, lines)))==1 and len(lines[0])<=80
    for run,line in zip(runs[:3], lines[1:]):
        model = run.learn.model.eval()
        with torch.no_grad(): (tx,ty),(x,y) = ((model(o.dataset.tensors[0]), o.dataset.tensors[1]) for o in (run.learn.dls[1],run.learn.dls[2]))
        acc,loss,train = 100*(tx.argmax(1)==ty).float().mean().item(),F.cross_entropy(tx,ty).item(),F.cross_entropy(x,y).item()
        assert line.split()==[*run.method.split(), f'{acc:.2f}', f'{loss:.3f}', f'{train:.3f}', '1']
        assert abs(run.scores['accuracy']*100-acc)<1e-4 and abs(run.scores['test_loss']-loss)<1e-5 and abs(run.scores['train_loss']-train)<1e-5

def test_ensembles_are_measured_as_ensembles(runs):
    for run,cb,n in zip(runs[3:], (SnapshotEnsemble(5),FGE()), (5,8)):
        learn = demo_learner(0)
        with learn.no_bar(),learn.no_logging(): learn.fit(n_epoch, cbs=cb)
        members = cb.members
        for k,i in ('test_loss',1),('train_loss',2):
            x,y = learn.dls[i].dataset.tensors
            p = 0
            for state in members:
                learn.model.load_state_dict(state)
                with torch.no_grad(): p += learn.model.eval()(x).double().softmax(1)/len(members)
            assert run.scores[k]==pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-4)
            if i==1: assert run.scores['accuracy']==pytest.approx((p.argmax(1)==y).float().mean().item())
        assert run.cost==len(members)==n and run.collected==tuple(cb.collected)

def test_histories_and_scores_agree(runs):
    sgd,swa,*_ = runs
    assert sgd.scores['accuracy']==pytest.approx(sgd.acc[-1]) and swa.scores['accuracy']==pytest.approx(swa.swa_acc[-1])
    assert np.isnan(swa.swa_acc).tolist()==[True]*6+[False]*2 and len(sgd.acc)==len(swa.acc)==n_epoch and not len(sgd.swa_acc)

def test_same_start(runs):
    sgd,swa,last,snap,fge = runs
    assert fge.acc[:6]==swa.acc[:6]                          # a constant rate until FGE's cycles begin
    for o in 'train','valid': assert all(torch.equal(a,b) for a,b in zip(getattr(sgd.learn.dls,o).dataset.tensors, getattr(swa.learn.dls,o).dataset.tensors))
    assert sgd.acc[:4]==swa.acc[:4] and sgd.lrs[:40]==swa.lrs[:40] and sgd.lrs[-1]<swa.lrs[-1]     # until SGD's rate falls

def test_swa_is_the_mean(runs):
    learn,ws = demo_learner(0),[]
    class Keep(demo.Callback):
        def after_epoch(self): ws.append([p.detach().clone() for p in self.learn.model.parameters()])
    with learn.no_bar(),learn.no_logging(): learn.fit(n_epoch, cbs=Keep())   # a constant rate is all that SWA changes here
    for p,*o in zip(runs[1].learn.model.parameters(), *ws[-2:]): torch.testing.assert_close(p.detach(), sum(o)/2)
    for state,w in zip(runs[1].walk.members, ws[-2:]): assert all(torch.equal(a,b) for a,b in zip([state[k] for k,_ in learn.model.named_parameters()], w))

def test_last_weights_are_those_of_the_walk(runs):
    "The weights that SWA's training ended with, and the statistics that the average would get"
    last,swa = runs[2],runs[1]
    assert last.method=='last weights' and last.cost==1
    model = {k:v.clone() for k,v in swa.learn.model.state_dict().items()}
    learn,ws = demo_learner(0),[]
    with learn.no_bar(),learn.no_logging(): learn.fit(n_epoch)               # a constant rate is all that SWA changes here
    for (k,p),q in zip(last.learn.model.named_parameters(), learn.model.parameters()): assert torch.equal(p, q), k
    assert not torch.equal(last.learn.model[0][1].running_mean, learn.model[0][1].running_mean)      # not the running ones
    with learn.no_bar(): learn.update_bn()
    for p,q in zip(last.learn.model.buffers(), learn.model.buffers()): torch.testing.assert_close(p, q, rtol=.2, atol=.1)     # other shifts of the pictures
    assert all(torch.equal(v, model[k]) for k,v in swa.learn.model.state_dict().items())

def test_deterministic(runs):
    torch.rand(7), np.random.rand(7)                         # whatever was drawn before
    for a,b in zip(runs, run_seed(0, n_epoch)):
        assert a.scores==b.scores and a.acc==b.acc and a.lrs==b.lrs
        assert all(torch.equal(p,q) for p,q in zip(a.learn.model.state_dict().values(), b.learn.model.state_dict().values()))

def test_table_spread_and_more_rows():
    rows = made_up('SGD', [.92,.94], [.4,.2]) + made_up('SWA', [.95,.95], [.3,.3]) + made_up('ensemble', [.96,.94], [.3,.3], cost=5)
    lines = table([rows[i] for i in (0,2,4,1,3,5)]).splitlines()     # as seeds come, one after the other
    assert lines[1].split()=='SGD 93.00 ± 1.41 0.300 ± 0.141 0.700 ± 0.000 1'.split()
    assert [o.split()[0] for o in lines[1:]]==['SGD','SWA','ensemble'] and lines[3].endswith(' 5')
    assert '±' not in table(rows[::2])

# Words

def test_verdict_wins():
    v = verdict(made_up('SGD', [.93]*3, [.38]*3) + made_up('SWA', [.945,.925,.95], [.32]*3, .72))
    assert 'Test accuracy: SWA won, 94.00 against 93.00; better on 2 of 3 seeds.' in v
    assert 'Test loss: SWA won, 0.320 against 0.380; better on 3 of 3 seeds.' in v
    assert 'SWA has 0.720, SGD 0.700. The average fits' in v and 'Part of the gain is protection' in v and '20% of wrong labels' in v.replace('\n',' ')
    assert 'not win' not in v and '--seeds' not in v

def test_verdict_loses():
    v = verdict(made_up('SGD', [.93], [.38]) + made_up('SWA', [.92], [.39], .6, collected=(70,80)))
    assert 'Test accuracy: SWA did not win here, 92.00 against 93.00.' in v and 'Test loss: SWA did not win here, 0.390 against 0.380.' in v
    assert 'SWA won' not in v and 'Part of the gain is' not in v and 'less closely' not in v
    assert 'Only 2 snapshots' in v and '--seeds' in v

def test_verdict_judges_separately():
    v = verdict(made_up('SGD', [.93], [.38]) + made_up('SWA', [.92], [.37]))
    assert 'Test accuracy: SWA did not win here' in v and 'Test loss: SWA won' in v
    v = verdict(made_up('SGD', [.93], [.38]) + made_up('SWA', [.93], [.3801]))
    assert v.count('a tie')==2 and 'won' not in v and 'forward passes' not in v and 'ensemble' not in v

def test_verdict_has_the_ensembles():
    v = verdict(made_up('SGD', [.93]*2, [.38]*2) + made_up('SWA', [.94]*2, [.37]*2) + made_up('snapshots', [.95,.96], [.4]*2, cost=5) + made_up('FGE', [.94]*2, [.4]*2, cost=4)).replace('\n',' ')
    assert 'Test accuracy for forward passes per prediction: SWA 94.00 for 1, snapshots 95.50 for 5, FGE 94.00 for 4.' in v and 'less sure still' in v

# The picture

def test_plot(runs, tmp_path):
    fig = plot(runs, tmp_path/'a.png')
    assert (tmp_path/'a.png').read_bytes().startswith(b'\x89PNG')
    assert len(fig.axes)==2                                  # of two snapshots there is no plane
    (swa,sgd,dots),(w,s,avg) = (o.lines for o in fig.axes)
    cyc,n = swa_cycles(n_epoch, 10, .75, 1),10*n_epoch
    f = sched_authors(.2, .002, 1.)
    np.testing.assert_allclose(sgd.get_ydata(), [f(i/n) for i in range(n)], rtol=1e-6)
    np.testing.assert_allclose(swa.get_ydata(), .2)
    assert (dots.get_xdata()*10).round().tolist()==list(cyc.ends)==[70,80] and set(dots.get_ydata())=={.2}
    np.testing.assert_allclose(s.get_ydata(), 100*np.array(runs[0].acc))
    np.testing.assert_allclose(w.get_ydata(), 100*np.array(runs[1].acc))
    np.testing.assert_allclose(avg.get_ydata(), 100*np.array(runs[1].swa_acc))
    for ax in fig.axes: assert ax.get_xlabel()=='epoch' and ax.get_ylabel()
    assert len({(o.get_linestyle(),o.get_linewidth()) for o in (w,s,avg)})==3      # without colours too

def test_plane_of_the_walk(monkeypatch):
    walk = FGE()
    run = fit_run('SWA', demo_learner(0), 16, SWA(swa_lr=.2, cycle_len=1, eval_every=1), walk=walk)
    assert walk.n_members==4
    pl = walk_plane(run, 5)
    names = [k for k,_ in run.learn.model.named_parameters()]
    w = [torch.cat([walk.members[i][k].flatten().double() for k in names]) for i in (1,2,3)]
    for i,a in enumerate(w):
        for j,b in enumerate(w):
            p,q = (np.array(pl.points[f'$W_{k+1}$']) for k in (i,j))
            assert np.linalg.norm(p-q)==pytest.approx((a-b).norm().item(), rel=1e-4)     # distances in the picture are those of the weights
    monkeypatch.setattr(demo, 'walk_plane', lambda o: pl if o is run else None)      # it draws these, and measures no more of them
    fig = plot([*made_up('SGD', [.9], [.4], lrs=run.lrs, acc=run.acc), run])
    ax = fig.axes[2]
    at = {o.get_label():(o.get_xdata()[0],o.get_ydata()[0]) for o in ax.lines if not o.get_label().startswith('_')}
    for k,p in pl.points.items(): np.testing.assert_allclose(at[k], p, rtol=1e-5, atol=1e-5)
    assert ax.get_title()=='test loss' and ax.get_xlabel()

def test_plot_means_over_seeds(runs):
    fig = plot([*runs, *runs])
    np.testing.assert_allclose(fig.axes[1].lines[1].get_ydata(), 100*np.array(runs[0].acc))
    assert 'mean of 2 seeds' in fig.axes[1].get_ylabel()

def test_verdict_has_the_fair_comparison():
    base = made_up('SGD', [.90]*2, [.5]*2) + made_up('SWA', [.94,.95], [.37]*2)
    v = verdict(base + made_up('last weights', [.945]*2, [.36,.39]))
    own = v.replace('\n', ' ').split('which is what averaging')[1]
    assert 'Test accuracy: a tie, 94.50 against 94.50; better on 1 of 2 seeds.' in own
    assert 'Test loss: SWA won, 0.370 against 0.375; better on 1 of 2 seeds.' in own
    assert 'last weights' not in verdict(base) and 'forward passes per' not in v

# Screens

long = made_up('SGD', [.93]*2, [.38,.4]) + made_up('SWA', [.94]*2, [.37,.3]) + made_up('last weights', [.94]*2, [.37,.3]) + made_up('snapshots', [.95,.96], [.4,.5], cost=5)

@pytest.mark.parametrize('width', [40,60,80,96])
def test_nothing_is_wider_than_the_screen(width, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, 'run_seed', lambda seed, epochs, bar: long[::2])
    monkeypatch.setattr(demo, 'plot', lambda *args: None)
    monkeypatch.setenv('COLUMNS', str(width if width<96 else 200))           # lines of 200 would be hard to read
    main(['--seeds','1','--epochs','8','--out',str(tmp_path/'a.png')])
    out = capsys.readouterr().out
    lines = out.split('\nPicture: ')[0].splitlines()
    assert max(map(len, lines))<=width
    words = ' '.join(out.split())
    for o in '20% of the training labels are replaced by a wrong one','protection from over-training','half a point to a point': assert o in words

def test_table_on_a_narrow_screen():
    wide = table(long)
    assert len(wide.splitlines()[0])==80==max(map(len, wide.splitlines())) and table(long, 80)==wide
    narrow = table(long, 79).splitlines()
    assert max(map(len, narrow))<=40
    assert narrow[:5]==['SGD', '  test accuracy, %  93.00 ± 0.00', '  test loss         0.390 ± 0.014', '  training loss     0.700 ± 0.000', '  forward passes    1']
    assert [o for o in narrow if o[0]!=' ']==['SGD','SWA','last weights','snapshots']

# The command line

@pytest.fixture
def no_training(monkeypatch):
    def stop(*args, **kw): raise AssertionError('training began')
    monkeypatch.setattr(demo, 'run_seed', stop)

@pytest.mark.parametrize('args,say', [('--seeds 0','1 or more'), ('--seeds -3','1 or more'), ('--seeds two',"'two' is not a whole number"), ('--seeds 1.5','whole number'),
    ('--epochs 1','8 or more'), ('--epochs 7','8 or more'), ('--epochs nan','whole number'), ('--seeds','expected one argument'), ('--out no/such/a.png','cannot write'),
    ('--out a.pdf','.png'), ('--out .','.png'), ('--out folder.png','cannot write'), ('--lr 1','--lr'), ('more','more')])
def test_bad_values(args, say, no_training, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'folder.png').mkdir()
    with pytest.raises(SystemExit) as e: main(args.split())
    out,err = capsys.readouterr()
    assert e.value.code==2 and out=='' and err.count('\n')==1 and err.startswith('fastswa_demo: ') and say in err
    assert [o.name for o in tmp_path.iterdir()]==['folder.png']

def test_unwritable_default(no_training, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('fastswa_demo.png').mkdir()
    with pytest.raises(SystemExit) as e: main([])
    assert e.value.code==2 and 'cannot write fastswa_demo.png' in capsys.readouterr().err

def test_checking_leaves_files_alone(no_training, tmp_path):
    p = tmp_path/'old.png'
    p.write_bytes(b'old')
    for o in p,tmp_path/'new.png':
        with pytest.raises(AssertionError, match='training began'): main(['--out',str(o)])
    assert p.read_bytes()==b'old' and not (tmp_path/'new.png').exists()

def test_help(no_training, capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    out = capsys.readouterr().out
    assert e.value.code==0 and all(o in out for o in ('--seeds N','--epochs N','--out FILE'))

def test_ctrl_c(monkeypatch, capsys, tmp_path):
    class Press(demo.Callback):
        def after_batch(self):
            if self.epoch==1: raise KeyboardInterrupt
    monkeypatch.setattr(demo, 'run_seed', lambda seed, epochs, bar: [fit_run('SWA', demo_learner(seed), epochs, SWA(), Press())])
    assert main(['--seeds','1','--out',str(tmp_path/'a.png')])==130
    assert capsys.readouterr().err.strip()=='fastswa_demo: interrupted' and not (tmp_path/'a.png').exists()

def test_defaults(monkeypatch, tmp_path, capsys, runs):
    asked = []
    def run(seed, epochs, bar): asked.append((seed,epochs)); return runs
    monkeypatch.setattr(demo, 'run_seed', run)
    monkeypatch.delenv('COLUMNS', raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([]) is None
    assert asked==[(0,60),(1,60)] and Path('fastswa_demo.png').exists()
    out = capsys.readouterr().out
    assert table([*runs]*2) in out and '20% of the training labels are replaced by a wrong one' in ' '.join(out.split()) and max(map(len, out.splitlines()))<=96 and 'standard deviation' in out

def test_bar_in_a_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    main(['--seeds','1','--epochs','8','--out',str(tmp_path/'a.png')])
    out = capsys.readouterr().out
    assert '100.00% [32/32' in out and out.split('test accuracy, %')[0].count('\n')<10
    assert '\r' not in out[out.rindex('\r')+1:] and out[out.rindex('\r')+1:].lstrip().startswith('test accuracy')   # the bar has gone when the table comes

def test_from_another_folder_into_a_pipe(tmp_path, runs):
    code = 'import sys\nfrom fastswa.demo import main\ntry: main(["--seeds","0"])\nexcept SystemExit as e: assert e.code==2\nsys.exit(main(["--seeds","1","--epochs","8"]))'
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONWARNINGS','COLUMNS')}
    r = subprocess.run([sys.executable,'-c',code], cwd=tmp_path, env={**env,'PYTHONPATH':str(root)}, capture_output=True, text=True, encoding='utf-8')
    assert r.returncode==0 and r.stderr=='fastswa_demo: argument --seeds: give 1 or more, not 0\n'
    assert '\r' not in r.stdout and '█' not in r.stdout and table(runs) in r.stdout and verdict(runs) in r.stdout
    assert [o.name for o in tmp_path.iterdir()]==['fastswa_demo.png']
