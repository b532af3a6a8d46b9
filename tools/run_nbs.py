"""Execute notebooks in a real kernel, store what they print and draw, and clean them:
`python tools/run_nbs.py [nbs/00_average.ipynb ...]`"""
# Not `nbdev-test --save`: that is no Jupyter kernel, and would store a fit as a broken progress bar, not as its table.
import argparse,os,sys,tempfile,time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError,CellTimeoutError,DeadKernelError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.test import nb_test_cells

root = Path(__file__).resolve().parent.parent
# Small pictures that look alike whoever drew them
rc = '''figure.figsize: 6, 4
figure.dpi: 100
savefig.dpi: figure
'''

class Client(NotebookClient):
    "Runs the cells that `nbdev-test` would run; the others keep the outputs they have"
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        return await super().async_execute_cell(cell, cell_index, **kwargs) if cell_index in self.todo else cell

def kernel_env(tmp):
    "What a kernel may inherit from its user's machine and must not"
    (tmp/'matplotlibrc').write_text(rc)
    # this checkout's fastswa, installed or not
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])
    return dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning,ignore:IProgress not found',
                PYTHONPATH=path, MATPLOTLIBRC=str(tmp/'matplotlibrc'),
                MPLBACKEND='module://matplotlib_inline.backend_inline', IPYTHONDIR=str(tmp/'ipython'))

def run_nb(p):
    nb = nbformat.read(p, as_version=4)
    c = Client(nb, timeout=600, kernel_name='python3', record_timing=False,
               resources=dict(metadata=dict(path=str(p.parent))),
               extra_arguments=['--IPKernelApp.log_level=ERROR'])   # or every kernel warns of its unencrypted socket
    c.todo = {o.idx_ for o in nb_test_cells(p, get_config(root).tst_flags.split())}
    c.execute()
    nbformat.write(nb, p)   # only now: a notebook that fails stays as it was
    nbdev_clean(str(p))

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('nbs', nargs='*', type=Path, help='notebooks; all of nbs/ where none is named')
    nbs = [o.resolve() for o in parser.parse_args(args).nbs] or sorted((root/'nbs').glob('[!_.]*.ipynb'))
    bad = [o for o in nbs if not o.is_file()]
    if bad: sys.exit(f'No such notebook: {bad[0]}')
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        os.environ.update(kernel_env(Path(tmp)))
        for p in nbs:
            start = time.time()
            try: run_nb(p)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
                failed.append(p.name)
                print(e, file=sys.stderr)
            else: print(f'{p.name}: {time.time()-start:.0f} s', flush=True)
    if failed: sys.exit(f'Left as they were, because a cell failed: {", ".join(failed)}')

if __name__=='__main__': main()
