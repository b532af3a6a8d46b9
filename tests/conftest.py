"As many threads, no windows, no warnings of others' making: the same for every test and for every process that a test starts; and in which order files are run"
import gc,os,signal
threads = int(os.environ.get('FASTSWA_TEST_THREADS', 1))   # tiny models train several times faster on one
os.environ.update(OMP_NUM_THREADS=str(threads), MPLBACKEND='Agg')   # before torch and matplotlib are imported
os.environ.setdefault('PYTHONWARNINGS', 'ignore::FutureWarning')

import pytest,torch
torch.set_num_threads(threads)

if signal.getsignal(signal.SIGINT)==signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored in a shell's background jobs, and tests raise it

def pytest_report_header(config):
    return f'torch {torch.__version__}, instruction set {torch.backends.cpu.get_cpu_capability()}, {threads} thread{"s"*(threads>1)}'

@pytest.fixture(autouse=True)
def threads_kept():
    "Commands and scripts that set a number of their own keep it to themselves"
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)

# Files that take longest, longest first: two processes take one file after the other, and end together if the last ones are short
longest = 'notebooks distributed applications callback ensemble edges auto demo cifar landscape claims snapshots package compare lawa'.split()

def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem.removeprefix('test_')
        return longest.index(name) if name in longest else len(longest)
    items.sort(key=rank)

@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    "What is imported stays: the garbage collector, which fastai's learners keep busy, need not look through it again and again"
    gc.collect()
    gc.freeze()

def pytest_configure(config):
    "The order above, not the number of tests; and what fastai itself sets off when it is imported"
    if hasattr(config.option, 'loadscopereorder'): config.option.loadscopereorder = False
    for o in 'ignore:`torch.jit:FutureWarning','ignore:.*chained_assignment:DeprecationWarning': config.addinivalue_line('filterwarnings', o)

def pytest_pycollect_makeitem(collector, name, obj):
    "Skip the `test_eq`, `test_close`, ... that star imports from fastai bring along: they are no tests of ours"
    module = getattr(collector, 'module', None)
    if module and name.startswith('test') and getattr(obj, '__module__', module.__name__)!=module.__name__: return []
