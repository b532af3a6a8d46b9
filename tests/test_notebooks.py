"Every notebook runs, each in a fresh process"
import io,sys,multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config(Path(__file__).parent)
# Forked from a server that has imported fastai once. Not from pytest's own process: torch's threads do not survive a fork.
ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['fastai.vision.all'])

def _run(nb):
    "Whether `nb` runs through, and the traceback where it does not"
    sys.__stderr__ = io.StringIO()   # where nbdev prints it
    with working_directory(nb.parent): ok,_ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    return ok,sys.__stderr__.getvalue()

@pytest.mark.parametrize('nb', sorted(nbglob(cfg.nbs_path, as_path=True)), ids=lambda o: o.name)
def test_notebook(nb):
    with ProcessPoolExecutor(1, mp_context=ctx) as ex: ok,err = ex.submit(_run, nb.absolute()).result()
    if not ok: pytest.fail(f'{nb.name} failed\n{err}', pytrace=False)
