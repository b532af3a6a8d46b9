"Collected first and decided later, on the learners people have: LAWA, Snapshots, choose, SWAG and the automatic start"
import pytest, torch
from common import *
from fastswa.all import *
from test_applications import makers

methods = dict(fit=(3,), fit_one_cycle=(3,), fit_flat_cos=(3,), fit_sgdr=(2,1), fine_tune=(3,))
cells = [(k,'fit_one_cycle') for k in makers if k!='resnet18']+[('vision',m) for m in methods if m!='fit_one_cycle']

class Ends(Callback):
    "The weights after each epoch of the last fit, in float64"
    order,run_valid = 1000,False
    def before_fit(self): self.ws = []
    def after_train(self): self.ws.append([p.detach().double().clone() for p in self.learn.model.parameters()])
    def mean(self, k): return [torch.stack(o).mean(0) for o in zip(*self.ws[-k:])]

def is_mean(model, ws): return all(torch.allclose(p.detach().double(), w, rtol=1e-5, atol=1e-6) for p,w in zip(model.parameters(), ws, strict=True))

@pytest.mark.parametrize('kind,method', cells)
def test_matrix(kind, method, tmp_path):
    "One fit that all of them watch; then what each puts in"
    learn,item = makers[kind](tmp_path)
    ends,lawa,snaps,auto = Ends(),LAWA(2, 1., install=False),Snapshots(1.),SWA(start='auto', install=False)
    with quiet(learn): getattr(learn, method)(*methods[method], cbs=[ends, lawa, snaps, auto])
    last = state(learn.model)
    assert len(ends.ws)==3 and snaps.n_members==3 and lawa.n_averaged==2 and auto.n_averaged and auto.decision
    with quiet(learn):
        lawa.apply(learn); assert is_mean(learn.model, ends.mean(2)); lawa.restore(learn)
        snaps.average(learn, last=2); assert is_mean(learn.model, ends.mean(2)); learn.validate()
        table = snaps.choose(learn, n_train=16, n_valid=16, ax=False)
        k = int(table.chosen.to_numpy().argmax())
        assert table.loss.iloc[k]<=table.loss.iloc[0] and np.isfinite(table.loss).all()
        if table.index[k]=='last weights': assert is_mean(learn.model, ends.mean(1))
        snaps.restore(learn); assert same(state(learn.model), last)
        auto.apply(learn); assert auto.n_averaged>1 or is_mean(learn.model, ends.mean(1)); learn.validate(); auto.restore(learn)
        swag = SWAG.from_snapshots(snaps, learn)
        swag.apply(learn); assert is_mean(learn.model, ends.mean(3)); swag.restore(learn)
        assert np.isfinite(swag.validate(learn, n=2)[0]) and same(state(learn.model), last)
