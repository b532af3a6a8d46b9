"The benchmarks behind README, nbs/70_tutorial.claims.ipynb and nbs/75_tutorial.when.ipynb: they run, and what is stored is what they write"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from benchmarks import claims as b, cost, steps, when
from fastswa.demo import demo_learner
from fastswa.callback import SWA
from common import *

stored = json.loads((b.here/'claims.json').read_text())

def test_stored_results_are_whole():
    assert list(stored)==list(b.tasks) and all(len(stored[k])==t['seeds']>=10 for k,t in b.tasks.items())
    for k,seeds in stored.items():
        one = next(iter(seeds.values()))
        for o in seeds.values():
            assert o['scores'].keys()==one['scores'].keys() and all(np.isfinite(v) for arm in o['scores'].values() for v in arm.values())
    assert len({str(o) for seeds in stored.values() for o in seeds.values()})==sum(map(len, stored.values()))     # no seed is a copy of another

@pytest.mark.parametrize('task', ['cancer','diabetes'])
def test_script_writes_what_is_stored(task, tmp_path, monkeypatch):
    monkeypatch.setitem(b.tasks, task, dict(b.tasks[task], epochs=5))
    out = tmp_path/'a.json'
    b.main(['--seeds','1','--tasks',task,'--out',str(out)])
    new,old = json.loads(out.read_text())[task]['300'],stored[task]['300']
    assert new['scores'].keys()==old['scores'].keys() and all(new['scores'][k].keys()==old['scores'][k].keys() for k in new['scores'])
    assert {k:list(v) for k,v in new['geometry'].items()}=={k:list(v) for k,v in old['geometry'].items()}
    was = out.read_bytes()
    monkeypatch.setattr(b, 'run', lambda **kw: pytest.fail('computed again'))
    b.main(['--seeds','1','--tasks',task,'--out',str(out)])
    assert out.read_bytes()==was

def test_scores():
    p,y = torch.tensor([[.7,.3],[.4,.6],[.9,.1]]),torch.tensor([0,0,0])
    s = b.scores(p, y)
    assert s['err']==pytest.approx(100/3) and s['loss']==pytest.approx(F.nll_loss(p.log(), y).item()) and s['loss_t']<=s['loss']+1e-4
    sharp = F.softmax(3*p.log(), 1)
    assert b.scores(sharp, y)['loss_t']==pytest.approx(s['loss_t'], rel=.02)        # confidence does not enter
    s = b.scores(torch.tensor([[1.],[3.]]), torch.tensor([[0.],[0.]]))
    assert s['loss']==5 and s['err']==pytest.approx(5**.5)

def test_tasks():
    clean,noisy = b.digits(0, clean=True),b.digits(0)
    a,c = (o.dls.train.dataset.tensors[1] for o in (noisy,clean))
    assert (a!=c).sum()==100 and torch.equal(clean.dls[2].dataset.tensors[1], c)
    learn = b.tasks['cancer']['make'](0)
    y = torch.cat([o[-1].flatten() for o in learn.dls[2]])
    x = torch.cat([o[1] for o in learn.dls[2]])
    assert len(y)==150 and len(learn.dls.valid_ds)==419 and x.mean().abs()<1e-4
    from sklearn.datasets import load_breast_cancer
    truth = torch.tensor(load_breast_cancer().target)
    assert sum(learn.dls.valid_ds.items['y'].values==truth[learn.dls.valid_ds.items.index].numpy())==419                  # only training labels are wrong
    assert sum(learn.dls.train_ds.items['y'].values!=truth[learn.dls.train_ds.items.index].numpy())==30

def test_with_weights_leaves_nothing():
    learn = demo_learner(0)
    before = state(learn.model)
    with b.with_weights(learn, [torch.zeros_like(p) for p in learn.model.parameters()]): assert not next(learn.model.parameters()).any()
    assert same(before, state(learn.model))

# when.py

results = when.stored()

def test_stored_fits_are_whole():
    assert list(results['fits'])==list(when.fits) and all(len(o)>=6 for o in results['fits'].values()) and len(results['demo'])>=20
    for k,f in when.fits.items():
        for o in results['fits'][k].values():
            assert list(o)==['without','SWA()']+['SWA(swa_lr=lr)']*(f['lr'] is not None) and list(o['without'])==['running','last']
            for arm in [*o][1:]: assert list(o[arm])==['n','mean','running','last','window','chosen'] and 1<=o[arm]['window']<=o[arm]['n']
    every = [str(o) for seeds in [*results['fits'].values(), results['demo']] for o in seeds.values()]
    assert len(set(every))==len(every)                                                                      # no seed is a copy of another
    assert when.dump(results)==(when.here/'when.json').read_text()

@pytest.fixture
def short(monkeypatch):
    "Two of the fits, of so few epochs that they take no time"
    monkeypatch.setattr(when, 'fits', {'fit(5)': dict(when.fits['fit(5)'], args=(2,)), 'fine_tune(3)': dict(when.fits['fine_tune(3)'], args=(1,), make=when.make)})
    full = when.demo
    monkeypatch.setattr(when, 'demo', lambda seed: full(seed, epochs=2))

def test_when_writes_what_is_stored(short, tmp_path, monkeypatch, capsys):
    out = tmp_path/'a.json'
    args = ['--seeds','1','--demo_seeds','1','--out',str(out)]
    when.main(args)
    new,was = json.loads(out.read_text()),out.read_bytes()
    for k in when.fits:
        for arm,o in new['fits'][k]['500'].items(): assert list(o)==list(results['fits'][k]['500'][arm])
    assert list(new['demo']['700'])==list(results['demo']['700'])
    for o in 'run','demo': monkeypatch.setattr(when, o, lambda *args: pytest.fail('computed again'))
    capsys.readouterr()
    when.main(args)
    shown = capsys.readouterr().out
    assert out.read_bytes()==was and '| `fit(5)` |' in shown and '| average |' in shown
    when.main([*args, '--show'])
    assert out.read_bytes()==was

def test_a_held_rate_leaves_the_walk_alone(short):
    "At a constant rate the last weights of `SWA(swa_lr=lr)` are those of the fit without SWA: one fit gives both"
    f = when.fits['fit(5)']
    both,alone = when.run(f, 3)['without'],when.train(f, 3)
    assert both['running']==alone['running']
    assert both['last']['loss']==pytest.approx(alone['last']['loss'], rel=1e-3)      # statistics are measured on batches in another order

def test_scores_of_a_walk(short):
    learn,swa = when.make(0, True),SWA(start=0, cycle_len=1)
    walk = when.Walk(swa)
    fit(learn, 4, cbs=[swa,walk])
    assert len(walk.ws)==swa.n_averaged==4
    mean = [torch.stack(o).mean(0) for o in zip(*walk.ws)]
    for p,w in zip(learn.model.parameters(), mean): assert torch.allclose(p, w, atol=1e-6)
    last = when.swa_scores(learn, swa, walk)
    when.at(learn, walk.ws[-1])
    assert when.score(learn, 2)['loss']==pytest.approx(last['last']['loss'], rel=1e-3)
    x,y = learn.dls[2].dataset.tensors
    assert len(y)==947 and when.score(learn, 2)['err']==pytest.approx(100*(learn.model(x).argmax(1)!=y).float().mean().item())

def test_when_splits():
    a,b,c = map(set, when.split(0))
    assert (len(a),len(b),len(c))==(600,250,947) and len(a|b|c)==1797
    clean,noisy = (when.make(0, o).dls for o in (False,True))
    assert (clean.train.dataset.tensors[1]!=noisy.train.dataset.tensors[1]).sum()==120
    for i in 1,2: assert torch.equal(clean[i].dataset.tensors[1], noisy[i].dataset.tensors[1])      # only training labels are wrong

def test_readme_has_the_stored_numbers():
    text = (b.here.parent/'README.md').read_text()
    for o in when.fit_table(results, False, chosen=False), when.fit_table(results, True, chosen=False), when.example(results):
        assert re.sub(r'[ \t]+$', '', o, flags=re.M) in text, 'run tools/run_nbs.py nbs/index.ipynb, then tools/readme.py'

# cost.py

def test_cost_tables_are_whole():
    res = cost.stored()
    text = (b.here.parent/'README.md').read_text()
    assert cost.fit_table(res) in text, 'run tools/run_nbs.py nbs/index.ipynb, then tools/readme.py'
    for o in [cost.fit_table(res), *cost.step_tables(res)]: assert len({line.count('|') for line in o.splitlines()})==1

def test_a_fit_is_longer_by_what_comes_once():
    a,c = ({'SWA()':x+.5, 'SWA(check=False)':x, 'SWA(eval_every=1)':2.} for x in (.5,1.))
    rows = cost.fit_table(dict(fits=dict(a=a, c=c))).splitlines()
    assert rows[0]=='| a fit takes longer by | a | c |' and rows[2]=='| averaging and BatchNorm statistics, 5 epochs | 10% | 20% |'
    assert rows[-2]=='| the check, in a fit of 10 epochs | 5% | 5% |' and rows[-1]=='| each epoch that `eval_every` evaluates | 75% | 50% |'

def test_time_of_a_fit_is_split():
    def tiny(): return (*(cost.TensorDataset(X[:64],Y[:64]) for _ in range(2)), net())
    assert 0<cost.one_fit(tiny)<10
    for ds,n in ((cost.Pictures(3),3), (cost.Pictures(2, train=False),2)): assert len(ds)==n and ds[1][0].shape==(3,32,32)

# steps.py

def test_steps_happen_in_a_fit(capsys):
    "Each round has a time of every contender, and the snapshots that were timed are in an average"
    res = steps.costs(net(), X[:8], Y[:8], rounds=2)
    assert {'step','collection','idle_iteration'}<res.keys() and all(len(o)==2 and min(o)>0 for o in res.values())
    steps.steps('tiny', net(), X[:8], Y[:8], rounds=1)
    assert 'averaging every   1 iterations takes' in capsys.readouterr().out

# All of them

@pytest.mark.parametrize('path', sorted(b.here.glob('[!_]*.py')), ids=lambda o: o.stem)
def test_a_script_finds_this_checkout(path, tmp_path):
    "In another folder, with nothing installed: this package, and the tests' learners where it has these. Its lines up to the path are enough to tell"
    head,rest = re.match(r'(.*?^sys.path.*?\n)(.*)', path.read_text(), re.M|re.S).groups()
    (tmp_path/path.name).write_text(head.replace('__file__', repr(str(path)))+'from importlib.util import find_spec\nfor o in "fastswa","common": print(find_spec(o) and find_spec(o).origin)')
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    r = subprocess.run([sys.executable, '-I', tmp_path/path.name], cwd=tmp_path, env=env, text=True, capture_output=True)
    root = b.here.parent
    assert r.returncode==0 and r.stdout.splitlines()==[str(root/'fastswa/__init__.py'), str(root/'tests/common.py') if 'from common import' in rest else 'None'], r.stderr

def test_each_has_its_row():
    "In benchmarks/README.md, which names the file where there is one; and there is no file without a script"
    names = {o.stem for o in b.here.glob('[!_]*.py')}
    rows = dict(re.findall(r'^\| `python benchmarks/(\w+)\.py` (.*)', (b.here/'README.md').read_text(), re.M))
    assert rows.keys()==names and {k for k,v in rows.items() if f'({k}.json)' in v}=={o.stem for o in b.here.glob('*.json')}
