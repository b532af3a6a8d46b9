"Every notebook runs, each in a fresh process"
import gc,os,sys,tempfile,multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor,ThreadPoolExecutor
from pathlib import Path

import pytest,torch
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config(Path(__file__).parent)
# Forked from a server that has imported fastai once. Not from pytest's own process: torch's threads do not survive a fork.
ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['fastai.vision.all', 'fastai.callback.all', 'matplotlib.pyplot', 'sklearn.datasets', 'nbdev.test'])

def _run(nb):
    "Whether `nb` runs through, and the traceback where it does not"
    gc.freeze()                                                  # see conftest.py
    threads,set_num_threads = int(os.environ['OMP_NUM_THREADS']),torch.set_num_threads
    torch.set_num_threads = lambda n: set_num_threads(threads)   # notebooks ask for one, as that is quickest
    torch.set_num_threads(threads)
    was = sys.stderr,sys.__stderr__
    with tempfile.TemporaryFile('w+', encoding='utf-8') as err:     # nbdev prints it to one or the other, by its version
        sys.stderr = sys.__stderr__ = err
        try:
            with working_directory(nb.parent): ok,_ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
        finally: sys.stderr,sys.__stderr__ = was
        err.seek(0)
        return ok,err.read()

def _run_fresh(nb):
    with ProcessPoolExecutor(1, mp_context=ctx) as ex: return ex.submit(_run, nb.absolute()).result()

@pytest.fixture(scope='module')
def results(request):
    "Of the notebooks that were asked for, two at a time"
    asked = [o.callspec.params['nb'] for o in request.session.items if o.function is test_notebook]
    with ThreadPoolExecutor(2) as ex: yield {nb:ex.submit(_run_fresh, nb) for nb in asked}

@pytest.mark.parametrize('nb', sorted(nbglob(cfg.nbs_path, as_path=True)), ids=lambda o: o.name)
def test_notebook(nb, results):
    ok,err = results[nb].result()
    if not ok: pytest.fail(f'{nb.name} failed\n{err}', pytrace=False)
