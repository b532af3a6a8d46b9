"The experiment behind nbs/70_tutorial.claims.ipynb: its script runs, and what is stored is what it writes"
import json
from functools import partial

import pytest, torch
import torch.nn.functional as F
import benchmark_claims as b
from fastswa.demo import demo_learner
from common import *

stored = json.loads((b.here/'benchmark_claims.json').read_text())

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
