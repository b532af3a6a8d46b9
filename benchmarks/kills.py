"""Does a killed training go on to the bit? `python benchmarks/kills.py [--n N] [--seed S]`; `--show` for the table

Twelve small trainings with `Resume`, each killed (SIGKILL) N times over at random moments: by the clock, at events, in
the middle of a write. After a kill it is started again, and perhaps killed again, until it ends; what came of it is
compared to the training that was left alone, to the bit: weights, average, statistics, optimizer, table, rates, random
streams and files of logs. The counts are written to `kills.json`, which nbs/55_resume.ipynb shows. The training is
started again with the same seed, so that a run that merely began anew would be the same too: `repeated` counts the
steps that were made twice. tests/test_resuming.py goes on with other seeds. Needs `os.fork`."""
import argparse, json, random, sys, warnings
from functools import partial
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))    # this checkout
import numpy as np
import pandas as pd
import torch
from fastai.basics import *
from fastai.callback.all import *
from fastai.data.load import DataLoader as FastaiDataLoader
from sklearn.datasets import load_digits
from torch import nn
from fastswa.all import *
from fastswa.testing import fit_outcome, kill_many

d = load_digits()
x,y = torch.tensor(d.images/16, dtype=torch.float32)[:,None],torch.tensor(d.target)

def net():
    return nn.Sequential(nn.Conv2d(1,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,2,1), nn.BatchNorm2d(16),
                         nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(64,10))

def noisy(b): return b[0]+.05*torch.randn_like(b[0]),b[1]

def learner(workers=0, opt_func=Adam):
    "Two parameter groups, dropout, and noise from torch's stream on each batch"
    for f in torch.manual_seed,random.seed,np.random.seed: f(0)
    train,valid = (list(zip(x[o], y[o])) for o in (slice(200),slice(200,300)))
    loader = partial(FastaiDataLoader, num_workers=workers)
    dls = DataLoaders(loader(train, bs=40, shuffle=True, after_batch=noisy), loader(valid, bs=64))
    return Learner(dls, net(), CrossEntropyLossFlat(), opt_func=opt_func, lr=.02, metrics=accuracy, path=Path('.'),
                   splitter=lambda m: [params(m[:4]), params(m[4:])])

def fit(learn, n_epoch, cbs): learn.fit(n_epoch, cbs=cbs)
def one_cycle(learn, n_epoch, cbs): learn.fit_one_cycle(n_epoch, cbs=cbs)
def flat_cos(learn, n_epoch, cbs): learn.fit_flat_cos(n_epoch, cbs=cbs)
def sgdr(learn, n_epoch, cbs): learn.fit_sgdr(2, n_epoch//3, cbs=cbs)
def fine_tune(learn, n_epoch, cbs): learn.fine_tune(n_epoch-1, cbs=cbs)
def authors(learn, n_epoch, cbs): learn.fit_swa(n_epoch, start=.5, check=False, cbs=cbs)

def watched(): return [SWA(start=.3, cycle_len=.4, eval_every=1)]
def tracked():
    return [SWA(start=.3, eval_every=1), SaveModelCallback(monitor='swa_loss'), EarlyStoppingCallback(patience=2),
            ReduceLROnPlateau(patience=1), CSVLogger('log.csv')]
def others(): return [EMA(check=False), LAWA(2, install=False), Snapshots(every=.3)]
def in_files(): return [FGE(start=.2, keep_on=Path('members'))]

# name -> the fit, its callbacks, how often a file is written, arguments of the learner
runs = {'fit, SWA':                             (fit, watched, 1, {}),
        'fit_one_cycle, SWA':                   (one_cycle, watched, 1, {}),
        'fit_one_cycle, SWA, within epochs':    (one_cycle, watched, '2it', {}),
        "fit_one_cycle, SWA('auto')":           (one_cycle, lambda: [SWA('auto')], .5, {}),
        'fit_flat_cos, EMA, LAWA, Snapshots':   (flat_cos, others, .5, {}),
        'fit_sgdr, MixUp':                      (sgdr, lambda: [MixUp()], 1, dict(opt_func=ranger)),
        'fit_swa':                              (authors, list, 1, {}),
        'fine_tune, SWA':                       (fine_tune, watched, 1, {}),
        'fine_tune, SWAG, within epochs':       (fine_tune, lambda: [SWAG(2)], '3it', {}),
        'fit, FGE in a folder, within epochs':  (fit, in_files, '3it', {}),
        'fit, SWA and trackers, a log':         (fit, tracked, 1, {}),
        'fit, two workers, within epochs':      (fit, watched, '2it', dict(workers=2))}

def training(how, cbs, every, kw):
    "What one life does, in a folder of its own"
    def run():
        torch.set_num_threads(1)
        warnings.simplefilter('ignore')
        learn,own = learner(**kw),cbs()
        with learn.no_bar(), learn.no_logging(): how(learn, 6, [*own, Resume('run', every)])
        return fit_outcome(learn, *own)
    return run

def counts(df): return dict(histories=len(df), kills=int(df.kills.sum()), repeated=int(df.repeated.sum()),
                            identical=int((df.fault=='').sum()), faults=sorted({*df.fault}-{''}))

def table(res):
    df = pd.DataFrame(res).T[['histories','kills','repeated','identical']].astype(int)
    df.loc['all'] = df.sum()
    return df.rename(columns=dict(histories='trainings', repeated='steps made twice'))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--n', type=int, default=14, help='trainings of each kind')
    p.add_argument('--seed', type=int, default=0, help='decides the moments')
    p.add_argument('--out', type=Path, default=here/'kills.json')
    p.add_argument('--show', action='store_true', help='only print what is stored')
    o = p.parse_args()
    res = json.loads(o.out.read_text()) if o.show else {}
    for k,run in {} if o.show else runs.items():
        res[k] = counts(kill_many(training(*run), o.n, seed=o.seed))
        o.out.write_text(json.dumps(res, indent=1)+'\n')
        print(k, res[k], flush=True)
    print(table(res).to_string())
    sys.exit(any(o['faults'] for o in res.values()))

if __name__=='__main__': main()
