"""What must hold in a distributed fit, checked in every process: started by test_distributed.py, as `python distributed_worker.py folder`, which
forks the processes when all is imported, and as `accelerate launch ... distributed_worker.py folder`

Each function below is one check; an assertion that fails in any process fails the check."""
import gc, json, multiprocessing, os, socket, sys, traceback, warnings
from datetime import timedelta
from pathlib import Path
root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root/'tests'), str(root/'examples'), str(root)]

import torch._dynamo                                         # DistributedDataParallel would import it in each process
from accelerate import Accelerator, InitProcessGroupKwargs
from common import *
from distributed import broadcast_on_cpu                     # the example
from fastai.distributed import DistributedDL
from fastswa import callback
from fastswa.compare import FairCheck
from fastswa.all import *
from fastswa.learner import measure_bn_within_memory, trained_layers
from torch import distributed as dist
from torch.nn.functional import batch_norm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset, DataLoader as TorchLoader
from torch.utils.data.distributed import DistributedSampler

torch.set_num_threads(1)
DistributedDL._broadcast = broadcast_on_cpu

def everywhere(o):
    res = [None]*W
    dist.all_gather_object(res, o)
    return res
def equal_everywhere(o):
    "Bit for bit"
    flat = lambda o: {k:v.tolist() for k,v in o.items()} if isinstance(o, dict) else [v.tolist() for v in o] if isinstance(o[0], torch.Tensor) else list(o)
    first,*others = everywhere(flat(o))
    return all(o==first for o in others)

def ctx(learn): return learn.distrib_ctx(sync_bn=False, cpu=True)
def made(**kw): return learner(s=rank, **{'n':240, 'bs':20, **kw})            # each process has random numbers of its own
def fitted(*args, method='fit', inside=None, learn=None, cbs=None, **kw):
    "A distributed fit, and what `inside` gives before its context ends"
    learn = made() if learn is None else learn
    with quiet(learn), ctx(learn):
        res = getattr(learn, method)(*args, cbs=cbs, **kw)
        return learn,res if inside is None else inside(learn)

def close(a, b, tol=1e-6):
    for x,y in zip(a, b, strict=True): torch.testing.assert_close(x.double(), y.double(), atol=tol, rtol=tol)
def bns(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
def stats(m): return [o for l in bns(m) for o in (l.running_mean.clone(),l.running_var.clone())]
def split(n=240, bs=20, **kw): return learner(s=rank, n=n, bs=bs, shuffle=False, drop_last=False, **kw)

checks = {'2':[], '3':[], 'accelerate':[]}
def check(f): checks['2'].append(f)
def check_in_3_too(f):
    "Where there is something between the first and the last process, or more than two parts are put together"
    for k in '2','3': checks[k].append(f)
def check_by_accelerate(f): checks['accelerate'].append(f)

@check_in_3_too
def every_process_has_the_same():
    swa,spy = SWA(start=1, cycle_len=.5, eval_every=1),Spy()
    learn,(mean,rows,names,val) = fitted(3, cbs=[swa,spy], inside=lambda l: (spy.mean(swa.collected), list(l.recorder.values), l.recorder.metric_names, l.validate()))
    assert swa.n_averaged>=3 and equal_everywhere(state(learn.model)) and equal_everywhere(swa.swa_model.state_dict())
    close(weights(learn.model), mean)
    assert all(equal_everywhere([repr(o) for o in row]) for row in rows)
    assert list(names[-3:-1])==['swa_loss','swa_accuracy']
    np.testing.assert_allclose(val, rows[-1][3:], rtol=1e-5)
    assert not [cb for cb in learn.cbs if isinstance(cb, SWA)] and type(learn.model) is nn.Sequential

@check
def same_walk_with_and_without():
    res = []
    for cbs in ([], [SWA(eval_every=1, swa_lr=False)]):
        spy,learn = Spy(),made(model=net(.3))
        fitted(3, learn=learn, cbs=[spy,*cbs])
        res.append((spy.ws,torch.get_rng_state(),random.getstate(),learn.dls.train.rng.getstate()))
    (a,*ra),(b,*rb) = res
    assert all(map(same, a, b)) and torch.equal(ra[0],rb[0]) and ra[1:]==rb[1:]

@check_in_3_too
def average_is_that_of_one_process_with_the_joined_batches():
    n,bs = 240,20
    seed()
    model,swa = plain_net(),SWA(start=1, eval_every=1)
    copy = deepcopy(model)
    learn,_ = fitted(3, learn=learner(model, s=0, n=n, bs=bs, shuffle=False), cbs=swa)
    per,k = n//W,n//W//bs                                    # what each process sees of an epoch, in items and batches
    order = [r*per+i*bs+j for i in range(k) for r in range(W) for j in range(bs)]
    items = list(zip(X[:n][order],Y[:n][order]))
    one = learner(copy, s=0, data=DataLoaders(FastaiDataLoader(items, bs=bs*W), FastaiDataLoader(list(zip(X[n:n+100],Y[n:n+100])), bs=64)))
    alone = SWA(start=1)
    fit(one, 3, cbs=alone)
    assert alone.collected==swa.collected
    close(weights(learn.model), weights(one.model), 1e-4)

@check
def the_check_at_the_end_is_made_together():
    seen = []
    class Watched(FairCheck):
        def losses(self, *args):
            seen.append(super().losses(*args))
            return seen[-1]
    swa,callback.FairCheck = SWA(),Watched
    train,valid = list(zip(X[:1000],Y[:1000])),list(zip(X[1000:1600],Y[1000:1600]))
    data = DataLoaders(FastaiDataLoader(train, bs=20, shuffle=True, drop_last=True), FastaiDataLoader(valid, bs=12))
    try: learn,_ = fitted(6, learn=made(data=data), cbs=swa)
    finally: callback.FairCheck = FairCheck
    assert len(seen)==2 and len(seen[0])==len(seen[1])>0 and equal_everywhere([float(o) for a in seen for o in a])
    assert equal_everywhere(state(learn.model))

@check
def an_automatic_start_decides_alike():
    swa,spy = SWA(start='auto'),Spy()
    learn,(mean,last) = fitted(4, .2, method='fit_one_cycle', cbs=[swa,spy], inside=lambda l: swa.compare(l).loss.tolist()[:0:-1])
    seen = swa.decision,swa.auto.seen['held'],*swa.collected,mean,last
    assert swa.decision and equal_everywhere(seen) and mean<=last*(1+1e-6), seen
    assert equal_everywhere(state(learn.model)) and equal_everywhere(spy.lrs)

@check_in_3_too
def statistics_are_those_of_one_process():
    swa = SWA()
    learn,_ = fitted(2, learn=split(), cbs=swa)
    there = stats(learn.model)
    update_bn(learn.model, learn.dls.train)                  # this loader has all of the data again, in the same batches
    close(there, stats(learn.model), 1e-6)
    assert equal_everywhere(there)

@check_in_3_too
def what_is_repeated_to_fill_up_does_not_count():
    n = 203
    class Left(Callback):
        order = -50                                          # the refresh is over, the loaders are still those of a distributed fit
        def after_fit(self): self.learn.kinds = [type(o).__name__ for o in self.dls] + [k for o in self.dls for k in vars(o) if k=='get_idxs']
    learn,_ = fitted(2, learn=split(n=n), cbs=[SWA(),Left()])
    pop = learn.model[0](X[:n]).transpose(0,1).flatten(1).double()
    close(stats(learn.model)[:2], [pop.mean(1),pop.var(1, unbiased=False)], 1e-5)
    assert learn.kinds==['DistributedDL']*2

@check_in_3_too
def bn_batches_are_those_of_each_process():
    learn,_ = fitted(2, learn=split(), cbs=SWA(bn_batches=2))
    per = 240//W
    seen = torch.cat([X[r*per:r*per+40] for r in range(W)])
    pop = learn.model[0](seen).transpose(0,1).flatten(1).double()
    close(stats(learn.model)[:2], [pop.mean(1),pop.var(1, unbiased=False)], 1e-5)

@check_in_3_too
def columns_are_those_of_one_process():
    swa = SWA(eval_every=1)
    learn,rows = fitted(3, learn=split(n_valid=120), cbs=swa, inside=lambda l: list(l.recorder.values))
    out = learn.model.eval()(X[240:360])
    want = [F.cross_entropy(out, Y[240:360]).item(),(out.argmax(1)==Y[240:360]).float().mean().item()]
    np.testing.assert_allclose(rows[-1][3:], want, rtol=1e-5)

@check
def fit_swa_and_one_cycle_and_fine_tune():
    for method in 'fit_swa','fit_one_cycle','fine_tune':
        spy,swa = Spy(),SWA(start=1)
        learn,res = fitted(4, method=method, learn=made(splitter=two_groups), cbs=spy if method=='fit_swa' else [spy,swa], **({'start':.7} if method=='fit_swa' else {}))
        swa = res if method=='fit_swa' else swa
        if method=='fit_swa':                                # its schedule is laid out for the iterations that each process has
            begin,total = swa.fit_state.cycles.begin,len(spy.ws)
            want = [sched_authors(.1, .05, begin/total)(i/total) for i in range(begin)]
            np.testing.assert_allclose([o[-1] for o in spy.lrs[:begin]], want)
        assert swa.collected[-1]==len(spy.ws) and swa.n_averaged>=3
        close(weights(learn.model), spy.mean(swa.collected))
        assert equal_everywhere(state(learn.model))
        if method=='fit_swa': assert len({o[-1] for o in spy.lrs[swa.collected[0]-1:]})==1 and spy.lrs[0][-1]==.1

@check
def early_stopping_and_best_average_decide_alike():
    swa = SWA(start=1, eval_every=1)
    learn = made(path=folder/'best')
    fitted(6, learn=learn, cbs=[swa, EarlyStoppingCallback('swa_loss', patience=1, min_delta=100.), SaveModelCallback('swa_loss', fname='best')],
           inside=lambda l: distrib_barrier())
    assert len(learn.recorder.values)==3 and equal_everywhere([len(learn.recorder.values), swa.n_averaged, *swa.collected])
    assert equal_everywhere(state(learn.model))

@check_in_3_too
def only_the_first_writes():
    mine = folder/f'rank{rank}'
    mine.mkdir()
    swa = SWA(eval_every=1, save_to=mine/'run.pth')
    learn = made(path=mine)
    fitted(3, learn=learn, cbs=[swa, CSVLogger(mine/'log.csv') if not rank else Callback()], inside=lambda l: swa.save(mine/'after.pth'))
    assert sorted(o.name for o in mine.rglob('*') if o.is_file())==([] if rank else ['after.pth','log.csv','run.pth'])

@check
def resumed_from_the_file_of_the_first():
    file = folder/'resume.pth'
    whole,spy = SWA(start=1),Spy()
    one,_ = fitted(4, learn=split(), cbs=[whole,spy])
    class Stop(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch==1: raise CancelFitException()
    half = SWA(start=1, save_to=file)
    learn = split()
    def save(l): l.save(folder/'model'); distrib_barrier()
    with quiet(learn), ctx(learn):
        learn.fit(4, cbs=[half,Stop()])
        half.restore(learn)
        save(learn)
    other = split(model=net())
    other.create_opt()
    other.load(folder/'model')
    swa = SWA(start=1).load(file)
    fitted(4, learn=other, cbs=swa, start_epoch=2)
    assert swa.n_averaged==whole.n_averaged and swa.collected==whole.collected
    close(weights(other.model), weights(one.model), 1e-5)
    assert equal_everywhere(state(other.model))

@check_in_3_too
def a_fit_that_was_killed_goes_on():
    class Dies(Callback):
        order = 20_000
        def __init__(self, at): self.at = at
        def after_batch(self):
            if self.learn.training and (self.learn.epoch,self.learn.iter)==self.at: raise KeyboardInterrupt
    def life(every=1, at=None, s=0):
        learn,swa = learner(net(.3), s=rank+s, n=240, bs=20),SWA(start=.3, cycle_len=.4, eval_every=1)
        with quiet(learn), ctx(learn), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: learn.fit(4, cbs=[swa, Resume(folder/f'run {every}', every), *([Dies(at)] if at else [])])
            except KeyboardInterrupt: return
            streams = rng_fingerprint(learn)
        return dict(model=state(learn.model), rows=[list(o) for o in learn.recorder.values], collected=swa.collected, streams=streams)
    whole = life('1h')
    for every,at in (1,(2,1)),('2it',(1,3)):
        assert life(every, at) is None
        again = life(every, s=10)
        # of three gradients DistributedDataParallel adds up another two first in the step after a start, before it has sorted its buckets
        if W>2: close(again.pop('model').values(), whole['model'].values(), 1e-6), again.pop('rows')
        assert [k for k in again if not (same(whole[k], again[k]) if k=='model' else str(whole[k])==str(again[k]))]==[], every

@check
def ensembles_in_memory_and_in_files():
    for keep_on in 'cpu','disk',folder/'members':
        ens = SnapshotEnsemble(3, keep_on=keep_on, bn_batches=None)
        learn,res = fitted(3, learn=split(n_valid=120, path=folder/f'ens{rank}'), cbs=ens, inside=lambda l: (ens.get_preds(l)[0], ens.validate(l)))
        assert ens.n_members==3 and all(equal_everywhere(o) for o in ens.members)
        probs,val = res
        assert equal_everywhere([probs]) and equal_everywhere(val)
        alone = []
        for m in ens.members:
            learn.model.load_state_dict(m)
            alone.append(learn.model.eval()(X[240:360]).softmax(1))
        torch.testing.assert_close(probs, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)

@check
def one_process_alone_waits_for_nobody():
    if rank: return
    ens = SnapshotEnsemble(2, keep_on=folder/'alone')
    learn = split()
    learn.remove_cbs([ProgressCallback, Recorder])           # whose metrics wait for all processes
    learn.fit(2, cbs=ens)
    assert ens.n_members==2==len(list((folder/'alone').iterdir()))

@check_in_3_too
def a_folder_that_one_cannot_use():
    "is an error in all"
    mine = folder/f'mine{rank}'
    mine.mkdir()
    if rank==W-1: torch.save({}, mine/'member_00000001.pt')
    try: fitted(2, learn=split(), cbs=SnapshotEnsemble(2, keep_on=mine))
    except (ValueError,RuntimeError) as e: err = e
    assert 'members of an earlier fit' in str(err) and isinstance(err, ValueError if rank==W-1 else RuntimeError)

@check_in_3_too
def outside_of_a_fit():
    "`learn.update_bn()` in the context shares the work; a plain one in a single process waits for nobody"
    learn,seen = split(),[]
    hook = learn.model[0].register_forward_hook(lambda m,inp,out: seen.append(len(out)))
    with quiet(learn), ctx(learn): learn.update_bn()
    hook.remove()
    assert sum(seen)==240//W and equal_everywhere(stats(learn.model))
    pop = learn.model[0](X[:240]).transpose(0,1).flatten(1).double()
    close(stats(learn.model)[:2], [pop.mean(1),pop.var(1, unbiased=False)], 1e-5)
    if not rank: update_bn(net(), learn.dls.train); split().update_bn()

@check_in_3_too
def plain_torch_with_a_sampler():
    ds = TensorDataset(X[:240],Y[:240])
    sampler = DistributedSampler(ds, shuffle=False)
    whole,parts = net(),net()
    update_bn(whole, [(X[:240][idx],) for i in range(0,240//W,20) for idx in [torch.arange(r, 240, W)[i:i+20] for r in range(W)]])
    update_bn(parts, TorchLoader(ds, 20, sampler=sampler))
    close(stats(whole), stats(parts))
    mine = [X[rank::W][:80]]                                 # no sampler to tell that these are parts
    for wrapped in DistributedDataParallel(net()),torch.compile(DistributedDataParallel(net()), backend='eager'):
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            update_bn(wrapped, mine)
        assert [o for o in ws if 'sync=True' in str(o.message)] and not equal_everywhere(stats(wrapped))
        update_bn(wrapped, mine, sync=True)
        assert equal_everywhere(stats(wrapped))
    if not rank: update_bn(wrapped, [X[:40]], sync=False)        # one alone
    own = net()
    update_bn(own, TorchLoader(ds, 20, sampler=sampler), sync=False)
    assert not equal_everywhere(stats(own))

@check_in_3_too
def unequal_numbers_of_batches():
    parts = X[:200].split(20)
    mine = parts[:1] if rank==0 else parts[1:] if rank==1 else []
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        m = update_bn(net(), list(mine), sync=True)
    close(stats(m), stats(update_bn(net(), list(parts))))
    assert not ws                                            # one process without data is no empty loader

@check_in_3_too
def an_error_in_one_is_an_error_in_all():
    class Bad:
        def __iter__(self):
            yield X[:20]
            if rank==W-1: raise OSError('disk gone')
            yield X[20:40]
    m = net()
    before = state(m)
    try: update_bn(m, Bad(), sync=True)
    except (OSError,RuntimeError) as e: err = e
    assert isinstance(err, OSError if rank==W-1 else RuntimeError) and 'disk gone' in str(err)
    assert rank==W-1 or f'process {W-1}' in str(err)
    assert same(before, state(m))
    class Fails(Callback):
        "In the refresh, in one process"
        order,run_valid = 20,True
        def __init__(self, event, exc): self.event,self.exc = event,exc
        def __call__(self, event):
            if event==self.event and rank==W-1 and not self.training and getattr(self.learn.dl, 'dl', None) is old: raise self.exc('bad picture')
        def after_loss(self): pass                           # what has it kept in the refresh
    for event,exc in ('before_batch',OSError),('before_validate',OSError),('before_batch',CancelFitException):
        for method in 'fit','update_bn':
            learn = made()
            old,cb,err = learn.dls.train,Fails(event, exc),None
            with quiet(learn), ctx(learn):
                try:
                    if method=='fit': learn.fit(1, cbs=[SWA(),cb])
                    else: learn.add_cb(cb); learn.update_bn()
                except (OSError,RuntimeError) as e: err = e
            if exc is CancelFitException: assert err is None and equal_everywhere(stats(learn.model)), (err,event,method)      # ends its pass early
            else: assert 'bad picture' in str(err) and isinstance(err, OSError if rank==W-1 else RuntimeError), (err,event,method)
            if method!='fit': assert learn.dls.train is old and type(learn.model) is nn.Sequential

@check_in_3_too
def all_take_smaller_batches_if_one_has_no_memory():
    class Hungry(nn.Module):
        def forward(self, x):
            if rank==W-1 and not self.training and len(x)>5: raise torch.OutOfMemoryError('CUDA out of memory')
            return x
    class Late(Callback):
        order = -50                                          # the loaders are still those of a distributed fit
        def after_fit(self): measure_bn_within_memory(self.learn, trained_layers(self.learn), inner=True).install()
    for in_fit in False,True:
        learn = split(model=nn.Sequential(Hungry(), *net()))
        with quiet(learn), ctx(learn), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(1, cbs=[Late(), Callback(before_validate=no_validation)]) if in_fit else learn.update_bn()
        assert len([o for o in told if 'out of memory with batches of 20 items' in str(o.message)])==1
        assert equal_everywhere(stats(learn.model)) and learn.dls.train.bs==20
        there = stats(learn.model)
        close(there, stats(update_bn(nn.Sequential(*learn.model[1:]), X[:240].split(5))), 1e-6)

def no_validation(self): raise CancelValidException()

@check_in_3_too
def errors_that_differ_end_it_for_all():
    class Bad(nn.Module):
        def forward(self, x): raise (OSError if rank==W-1 else torch.OutOfMemoryError)('bad module')
    learn,err = made(model=nn.Sequential(Bad(), *net())),None
    with quiet(learn), ctx(learn):
        try: learn.update_bn()
        except (OSError,RuntimeError) as e: err = e
    assert isinstance(err, OSError if rank==W-1 else torch.OutOfMemoryError), err

class CpuSync(nn.SyncBatchNorm):
    "What SyncBatchNorm computes, which torch has for GPUs only"
    def forward(self, x):
        if not self.training: return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)
        dims = [0,*range(2,x.dim())]
        sums = torch.stack([x.double().sum(dims), (x.double()**2).sum(dims), torch.full((self.num_features,), x.numel()//self.num_features, dtype=torch.float64)])
        dist.all_reduce(sums)
        s,ss,n = sums
        mean,var = (s/n).float(),(ss/n-(s/n)**2).float()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var*(n/(n-1)).float(), self.momentum)
        return batch_norm(x, mean, var, self.weight, self.bias, False, 0., self.eps)

@check_in_3_too
def synchronised_layers():
    def sync_net():
        m = net()
        for i in 1,4: m[i] = CpuSync(m[i].num_features)
        return m
    seed(rank)                                               # processes with batches of different sizes, one value per channel among them
    sizes = [20,7,13+rank]
    mine = [X[100*rank+at:100*rank+at+n] for at,n in zip([0,20,27], sizes)]
    joined = [torch.cat(o) for o in zip(*everywhere(mine))]
    one = update_bn(net(), joined)
    for sync in True,False:
        m = update_bn(sync_net(), mine, sync=sync)
        close(stats(m), stats(one), 1e-5)
        if sync: assert equal_everywhere(stats(m))
    seed()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64,5), CpuSync(5), nn.Linear(5,5), CpuSync(5))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64,5), nn.BatchNorm1d(5), nn.Linear(5,5), nn.BatchNorm1d(5))
    plain.load_state_dict(flat.state_dict())
    ones = [X[rank+10*i][None] for i in range(4)]            # one item in each process
    close(stats(update_bn(flat, ones, sync=True)), stats(update_bn(plain, [torch.cat(o) for o in zip(*everywhere(ones))])), 1e-5)

@check_by_accelerate
def mixed_precision_of_accelerate():
    "`accelerate launch --mixed_precision bf16` changes the model's forward: the refresh and the evaluation keep to it"
    seen,learn = {},made()
    model = learn.model
    hook = model[3].register_forward_hook(lambda m,_,out: seen.setdefault((model.training,model[1].training,torch.is_grad_enabled()), set()).add(out.dtype))
    swa = SWA(start=1, eval_every=1)
    _,(rows,val) = fitted(3, learn=learn, cbs=swa, inside=lambda l: (list(l.recorder.values), l.validate()))
    hook.remove()
    assert (False,True,False) in seen and len(seen)>=3 and set().union(*seen.values())=={torch.bfloat16}, seen      # the refresh among them
    np.testing.assert_allclose(val, rows[-1][3:], rtol=1e-4)
    assert equal_everywhere(state(learn.model)) and all(p.dtype==torch.float32 for p in learn.model.parameters())

def run_checks(procs):
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=120))])
    results = {}
    for f in checks[procs]:
        err = ''
        try: f()
        except Exception:
            err = traceback.format_exc()
            print(err, file=sys.stderr, flush=True)
        errs = everywhere(err)
        results[f.__name__] = '\n'.join(f'process {i}: {o}' for i,o in enumerate(errs) if o)
        if not rank: (folder/'results.json').write_text(json.dumps(results))
    gc.collect()                                             # models of passes that failed still hold the group
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0)                                              # torch's threads can abort a process that is over

def place(path):
    "Who this process is, and where it writes"
    global rank, W, folder
    rank,W,folder = int(os.environ['RANK']),int(os.environ['WORLD_SIZE']),Path(path)

def one_of(i, procs, port, path):
    "The life of a forked process, told who it is as torchrun tells it"
    os.environ.update(RANK=f'{i}', LOCAL_RANK=f'{i}', WORLD_SIZE=procs, LOCAL_WORLD_SIZE=procs, MASTER_ADDR='127.0.0.1', MASTER_PORT=f'{port}')
    place(path)
    run_checks(procs)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def fork_all(path):
    "Sound because nothing was computed yet that starts threads of torch's, and no process group was made"
    gc.freeze()
    started = []
    for procs in '2','3':
        (path/procs).mkdir()
        port = free_port()
        started += [multiprocessing.get_context('fork').Process(target=one_of, args=(i, procs, port, path/procs)) for i in range(int(procs))]
    for o in started: o.start()
    for o in started: o.join()
    sys.exit(any(o.exitcode for o in started))

def main(path):
    if 'RANK' not in os.environ: fork_all(Path(path))
    place(path)
    run_checks('accelerate')

if __name__=='__main__': main(sys.argv[1])
