"One thread, no windows, no warnings of others' making: the same for every test and for every process that a test starts"
import os,signal
os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='Agg')   # before torch and matplotlib are imported
os.environ.setdefault('PYTHONWARNINGS', 'ignore::FutureWarning')

import torch
torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT)==signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored in a shell's background jobs, and tests raise it

def pytest_configure(config):
    "What fastai itself sets off when it is imported"
    for o in 'ignore:`torch.jit:FutureWarning','ignore:.*chained_assignment:DeprecationWarning': config.addinivalue_line('filterwarnings', o)

def pytest_pycollect_makeitem(collector, name, obj):
    "Skip the `test_eq`, `test_close`, ... that star imports from fastai bring along: they are no tests of ours"
    module = getattr(collector, 'module', None)
    if module and name.startswith('test') and getattr(obj, '__module__', module.__name__)!=module.__name__: return []
