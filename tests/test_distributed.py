"""Distributed fits: what `distributed_worker.py` checks in 2 and 3 processes, and in 2 that accelerate starts; the example, started by torchrun; and DataParallel

All of these are started together, and each test waits for its own."""
import ast, gc, json, os, signal, subprocess, sys, weakref
import pytest, torch
from common import *
from fastai.distributed import ParallelTrainer
from fastswa.all import *
from fastswa.batchnorm import BNMeter
from fastswa.loader import is_sharded
from fastswa.processes import together, world_size

here = Path(__file__).resolve().parent
example = here.parent/'examples'/'distributed.py'
worker = here/'distributed_worker.py'
places = dict(check=['2'], check_in_3_too=['2','3'], check_by_accelerate=['accelerate'])
checks = [(k,o.name) for o in ast.parse(worker.read_text()).body if isinstance(o, ast.FunctionDef) for d in o.decorator_list for k in places[d.id]]
torchrun = '-m torch.distributed.run --standalone --nproc_per_node=2'.split()
accelerate = '-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --dynamo_backend=no --mixed_precision=bf16'.split()

class Launch:
    "A command in a process group of its own"
    def __init__(self, cmd, folder, gpus=False):
        folder.mkdir()
        self.folder,self.log = folder,(folder/'log').open('w+')
        env = {k:v for k,v in os.environ.items() if k not in ('RANK','WORLD_SIZE','LOCAL_RANK','MASTER_ADDR','MASTER_PORT') and not k.startswith('ACCELERATE_')}
        env |= {'PYTHONPATH':str(here.parent), 'PYTHONWARNINGS':'ignore', 'OMP_NUM_THREADS':'1', **({} if gpus else {'CUDA_VISIBLE_DEVICES':''})}
        self.proc = subprocess.Popen([sys.executable,*map(str, cmd)], stdout=self.log, stderr=self.log, env=env, cwd=folder, start_new_session=True)
    def alive(self):
        try: os.killpg(self.proc.pid, 0)
        except ProcessLookupError: return False
        return True
    def stop(self):
        if self.alive(): os.killpg(self.proc.pid, signal.SIGKILL)
        self.proc.wait()
        self.log.close()
    def wait(self, timeout=300):
        "What it printed and its exit code, None if it had to be stopped"
        try: code = self.proc.wait(timeout)
        except subprocess.TimeoutExpired: self.stop(); code = None
        return (self.folder/'log').read_text(),code

@pytest.fixture(scope='module')
def launched(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('distributed')
    cmds = dict(forked=[worker, tmp/'forked'], accelerate=[*accelerate, worker, tmp/'accelerate'], example=[*torchrun, example, '--epochs=2', '--save', tmp/'example'])
    res = {k:Launch(cmd, tmp/k) for k,cmd in cmds.items()}
    yield res
    for o in res.values(): o.stop()

@pytest.mark.parametrize('procs,check', checks)
def test_in_every_process(launched, procs, check):
    run = launched['accelerate' if procs=='accelerate' else 'forked']
    out,_ = run.wait()
    results = (run.folder if procs=='accelerate' else run.folder/procs)/'results.json'
    assert results.exists(), out[-5000:]
    results = json.loads(results.read_text())
    assert check in results, f'it never ended\n{out[-5000:]}'
    assert not results[check], results[check]

@pytest.mark.parametrize('run', ['forked','accelerate','example'])
def test_nothing_is_left_running(launched, run):
    out,code = launched[run].wait()
    assert code==0, out[-5000:]
    assert not launched[run].alive()

def test_example(launched):
    out,_ = launched['example'].wait()
    assert '2 processes, 10 snapshots averaged: loss' in out and 'swa_accuracy' in out
    assert [o.name for o in launched['example'].folder.rglob('*.pth')]==['averaged.pth']

@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs')
def test_example_on_gpus(tmp_path):
    "NCCL and SyncBatchNorm"
    run = Launch([*torchrun, example, '--epochs=2'], tmp_path/'run', gpus=True)
    try: out,code = run.wait()
    finally: run.stop()
    assert code==0 and '2 processes, 10 snapshots averaged: loss' in out, out

# What needs one process only
# ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available(), reason='there DataParallel takes no model on the CPU')
@pytest.mark.parametrize('where', ['fit','context'])
def test_data_parallel(where):
    "On a machine without GPUs DataParallel passes everything on to the module it wraps"
    res = []
    for parallel in False,True:
        swa,spy,learn = SWA(eval_every=1),Spy(),learner()
        with quiet(learn):
            if not parallel: learn.fit(3, cbs=[swa,spy])
            elif where=='fit': learn.fit(3, cbs=[swa,spy,ParallelTrainer(None)])
            else:
                with learn.parallel_ctx(): learn.fit(3, cbs=[swa,spy])
        for p,m in zip(learn.model.parameters(), spy.mean(swa.collected)): torch.testing.assert_close(p.detach().double(), m, atol=2e-6, rtol=1e-5)
        res.append((state(learn.model), learn.recorder.values[-1]))
    assert same(res[0][0], res[1][0]) and list(res[0][1])==list(res[1][1])

class Replicas(nn.DataParallel):
    "As on several GPUs: what replicas measure is lost"
    def forward(self, x): return torch.cat([deepcopy(self.module)(o) for o in x.chunk(2)])

def test_replicas_do_not_measure():
    class Trainer(Callback):
        order = 0
        def before_fit(self): self.learn.model = Replicas(self.learn.model)
        def after_fit(self): self.learn.model = self.learn.model.module
    learn = learner(shuffle=False)
    fit(learn, 2, cbs=[SWA(),Trainer()])
    there = state(learn.model)
    update_bn(learn.model, learn.dls.train)
    for k,v in learn.model.state_dict().items(): torch.testing.assert_close(there[k], v)

class DistributedTrainer(Callback):
    "fastai's makes new SyncBatchNorm layers each time that anything begins"
    order = 11
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)
class SubclassOfIt(DistributedTrainer): pass

@pytest.mark.parametrize('trainer', [DistributedTrainer, SubclassOfIt])
def test_layers_that_a_trainer_replaces_outside_of_a_fit(trainer):
    learn = learner(cbs=trainer(), shuffle=False)
    old = learn.model[1]
    with quiet(learn): learn.update_bn()
    assert type(learn.model[1]) is nn.SyncBatchNorm and learn.model[1] is not old
    pop = learn.model[0](X[:200]).transpose(0,1).flatten(1).double()
    torch.testing.assert_close(learn.model[1].running_mean.double(), pop.mean(1), atol=1e-5, rtol=1e-5)

def test_average_of_a_model_whose_layers_are_replaced(tmp_path):
    learn,swa,spy = learner(cbs=DistributedTrainer(), shuffle=False),SWA(eval_every=1),Spy()
    fit(learn, 3, cbs=[swa,spy])
    last,average = learn.recorder.values[-1],state(learn.model)
    with quiet(learn):
        np.testing.assert_allclose(learn.validate(), last[-2:], rtol=1e-6)
        swa.restore(learn)
        assert same(weights(learn.model), spy.ws[-1])
        np.testing.assert_allclose(learn.validate(), last[1:3], rtol=1e-6)         # its statistics too
        swa.apply(learn)
        assert same(state(learn.model), average)
        learn.validate()
        swa.save(tmp_path/'s')
        plain = learner(net())
        swa.copy_to(plain.model)
        for m in plain.model,swa.swa_model: assert all(torch.equal(v, average[k]) for k,v in m.state_dict().items() if 'tracked' not in k)
        for at_once in True,False:                                                 # loaded, and measured by a pass that replaces the layers again
            other,again = learner(cbs=DistributedTrainer(), shuffle=False),SWA().load(tmp_path/'s')
            if not at_once: again._average.state['bn'] = None
            again.apply(other)
            for k,v in other.model.state_dict().items():
                if 'tracked' not in k: torch.testing.assert_close(v, average[k])
            again.restore(other); again.apply(other)

def test_failed_pass_is_forgotten():
    "Nothing of it stays in memory, on a GPU that would be all activations"
    class Big: pass
    seen = []
    def dl():
        big = Big()
        seen.append(weakref.ref(big))
        yield X[:20]
        raise OSError('disk gone')
    gc.collect(); gc.disable()
    try:
        try: update_bn(net(), dl())
        except OSError: pass
        assert seen[0]() is None
    finally: gc.enable()

def test_who_gives_parts():
    ds = torch.utils.data.TensorDataset(X,Y)
    loader = lambda **kw: torch.utils.data.DataLoader(ds, 20, **kw)
    sampler = torch.utils.data.distributed.DistributedSampler(ds, 2, 0)
    assert is_sharded(loader(sampler=sampler))
    assert is_sharded(torch.utils.data.DataLoader(ds, batch_sampler=torch.utils.data.BatchSampler(sampler, 20, False)))
    for o in loader(), dls().train, [X], iter([X]): assert not is_sharded(o)
    from accelerate.data_loader import prepare_data_loader
    kw = dict(num_processes=2, process_index=0, put_on_device=True, device=torch.device('cpu'))
    assert is_sharded(prepare_data_loader(loader(), **kw)) and is_sharded(prepare_data_loader(loader(), dispatch_batches=True, **kw))
    assert world_size()==1

def test_one_process_exchanges_nothing():
    with pytest.raises(OSError, match='as it is'), together(False) as group:
        group.barrier()
        raise OSError('as it is')

def test_parts_with_nothing_in_them():
    m = BNMeter([nn.BatchNorm1d(2)])
    empty,full = (0,torch.zeros(1).double(),torch.zeros(2).double(),torch.zeros(2).double()),(3,torch.tensor([4.]).double(),torch.tensor([1.,2]).double(),torch.tensor([8.,4]).double())
    m.merge_state([empty,full,empty])
    assert m.batches==3 and m.moments.n.tolist()==[4] and m.moments.mean.tolist()==[1,2] and m.moments.m2.tolist()==[8,4]
    m.merge_state([empty,empty])
    assert m.moments.n.tolist()==[0] and m.moments.mean.isfinite().all()
