"The authors' experiment: recipes, networks, data, steps, checkpoints and the command line; on a few made-up pictures with cut-down networks"
import json,multiprocessing,os,random,signal,subprocess,sys,tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np,pytest,torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.callback.core import Callback
from fastai.data.external import URLs,fastai_cfg

from fastswa import cifar
from fastswa.cifar import (Job,PadCrop,Pixels,cifar_dls,cifar_learner,cifar_pixels,labels,main,nets,paper,preresnet,read_history,recipe,results,run_all,run_job,
                           sched_epochs,table,vgg16,wide_resnet)
from fastswa.callback import SWA
from fastai.torch_core import TensorImage,set_seed

root,cpu = Path(__file__).resolve().parent.parent,torch.device('cpu')
classes = dict(apple='fruit', pear='fruit', oak='trees')
n_train,n_test = 8,4     # of each class

def make_pictures(path, coarse=True):
    "Noise with a colour cast, in folders as in the archives of fastai"
    rng = np.random.default_rng(0)
    for part,n in ('train',n_train),('test',n_test):
        for k,(name,group) in enumerate(classes.items()):
            folder = path/part/group/name if coarse else path/part/name
            folder.mkdir(parents=True)
            for i in range(n): Image.fromarray((rng.uniform(0, 150, (32,32,3))+60*np.eye(3)[k]).astype('uint8')).save(folder/f'{i}_{name}.png')
    (path/'labels.txt').write_text('\n'.join(classes))
    return path

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_pictures(tmp_path_factory.mktemp('pictures')/'cifar100')

@pytest.fixture(scope='module')
def pixels(folder): return cifar_pixels(folder, num_workers=0)

tiny = dict(vgg16=partial(vgg16, width=2), preresnet110=partial(preresnet, depth=11, width=2), preresnet164=partial(preresnet, depth=11, width=2),
            wrn28x10=partial(wide_resnet, depth=10, widen=2, width=2))

@pytest.fixture
def small(monkeypatch):
    "Cut-down networks, for what builds them by name"
    for k,f in tiny.items(): monkeypatch.setitem(nets, k, f)
    monkeypatch.setattr(cifar, 'default_device', lambda: cpu)

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def same_file(a, b): return same(*(torch.load(o, weights_only=True) for o in (a,b)))

# The paper and the recipes

def test_paper():
    assert paper['vgg16','cifar100']=={'SGD':(72.55,.10), 'SWA 1':(73.91,.12), 'SWA 1.25':(74.17,.15), 'SWA 1.5':(74.27,.25)}
    assert paper['wrn28x10','cifar10']['SWA 1.5']==(96.79,.05) and paper['preresnet110','cifar10']['SWA 1.25']==(95.65,.03)
    assert len(paper)==8 and {m for m,_ in paper}==set(nets)
    for row in paper.values(): assert list(row)==list(labels) and row['SGD'][0]<min(a for k,(a,_) in row.items() if k!='SGD')

def test_recipes():
    "Commands in the authors' README, which leave momentum and batch size at train.py's defaults"
    want = {('vgg16',d):(200,.05,.01,161,5e-4) for d in ('cifar10','cifar100')} | {('wrn28x10',d):(200,.1,.05,161,5e-4) for d in ('cifar10','cifar100')}
    for m in 'preresnet110','preresnet164': want |= {(m,'cifar100'):(150,.1,.05,126,3e-4), (m,'cifar10'):(150,.1,.01,126,3e-4)}
    assert want.keys()==paper.keys()
    for (m,d),o in want.items():
        r = recipe(m, d)
        assert (r.epochs,r.lr,r.swa_lr,r.swa_start,r.wd)==o and (r.mom,r.bs)==(.9,128)
        assert [*r.marks().values()]==[r.epochs, r.epochs, r.epochs*5//4, r.epochs*3//2]
        assert r.stats[0][0]==(.485 if m=='vgg16' else .4914) and r.stats[1][0]==(.229 if m=='vgg16' else .2023)

@pytest.mark.parametrize('n', [4,5,10,150])
def test_recipe_scaled(n):
    for m,d in paper:
        r,full = recipe(m, d, n),recipe(m, d)
        assert r.epochs==n and 1<=r.swa_start<=n and abs(r.swa_start/n-full.swa_start/full.epochs)<=.5/n+1e-9
        assert len(set(r.marks().values()))==3 and replace(r, epochs=full.epochs, swa_start=full.swa_start)==full

# Learning rates

def authors(epoch, method, lr_init, swa_lr, swa_start, epochs):
    "Rate of an epoch, counted from 0, as their train.py defines it"
    t,ratio = (epoch/swa_start,swa_lr/lr_init) if method=='swa' else (epoch/epochs,.01)
    if t<=.5: return lr_init
    return lr_init*(1-(1-ratio)*(t-.5)/.4) if t<=.9 else lr_init*ratio

@pytest.mark.parametrize('model,data', paper)
@pytest.mark.parametrize('method', ['sgd','swa'])
def test_schedule_of_every_iteration(model, data, method):
    r,n_iter = recipe(model, data),391
    n = r.marks()['SWA 1.5' if method=='swa' else 'SGD']
    f = sched_epochs(partial(r.lr_at, swa=method=='swa'), n)
    want = np.array([authors(e, method, r.lr, r.swa_lr, r.swa_start, r.epochs) for e in range(n)])
    for i in 0,1,n_iter//2,n_iter-1: np.testing.assert_allclose([f((e+i/n_iter)/n) for e in range(n)], want, rtol=1e-12)
    np.testing.assert_allclose([f(e/n+sum([1/(n_iter*n)]*(n_iter-1))) for e in range(n)], want, rtol=1e-12)     # as fastai adds it up

class Rates(Callback):
    order,run_valid = 1000,False
    def __init__(self): self.lrs,self.moms,self.wds = [],[],[]
    def after_batch(self): h = self.opt.hypers[-1]; self.lrs.append(h['lr']); self.moms.append(h['mom']); self.wds.append(h['wd'])

def linear(n): return nn.Sequential(nn.Flatten(), nn.Linear(12,n))

@pytest.mark.parametrize('job,n_iter', [(Job('preresnet164','cifar10','swa'),1), (Job('vgg16','cifar100','swa', epochs=12),3), (Job('preresnet110','cifar100','sgd', epochs=20),2)])
def test_rates_and_collections_of_a_whole_run(job, n_iter, tmp_path, monkeypatch):
    for o,name in (cifar.Learner,'save'),(SWA,'save'),(cifar,'_write_json'): monkeypatch.setattr(o, name, lambda *a, **kw: None)    # not now
    n = 128*n_iter-1
    x,y = torch.randint(0, 256, (n,3,2,2), dtype=torch.uint8),torch.arange(n)%2
    rates,r,ws = Rates(),job.recipe,[]
    class Walk(Callback):
        order = 1000
        def after_epoch(self):
            ws.append(self.learn.model[1].weight.detach().double().clone())
            if hasattr(self.learn, 'swa'): self.swa_ = self.learn.swa
    walk,n = Walk(),max(job.marks().values())
    rows = run_job(job, (Pixels(x, y, ['a','b'], 0),Pixels(x, y, ['a','b'], 1)), tmp_path, net=linear, device=cpu, cbs=[rates,walk])
    assert len(rows)==n and [o['epoch'] for o in rows]==list(range(1,n+1))
    want = [authors(i//n_iter, job.method, r.lr, r.swa_lr, r.swa_start, r.epochs) for i in range(n_iter*n)]
    np.testing.assert_allclose(rates.lrs, want, rtol=1e-12)
    np.testing.assert_allclose([o['lr'] for o in rows], want[n_iter-1::n_iter], rtol=1e-12)
    assert set(rates.moms)=={.9} and set(rates.wds)=={r.wd}
    final = torch.load(tmp_path/job.name/f'model-{n}.pth', weights_only=True)['1.weight'].double()
    if job.method=='sgd': torch.testing.assert_close(final, ws[-1]); return
    assert walk.swa_.collected==[n_iter*e for e in range(r.swa_start, n+1)]              # after each epoch from swa_start on, counted from 1
    torch.testing.assert_close(final, torch.stack(ws[r.swa_start-1:]).mean(0), rtol=1e-5, atol=1e-7)
    measured = [o['epoch'] for o in rows if o['swa_accuracy'] is not None]
    assert measured==sorted({e for e in range(r.swa_start, n+1) if e%5==0} | {*r.marks().values()})

# Networks

def n_params(m): return sum(o.numel() for o in m.parameters())

@pytest.mark.parametrize('model,n_out,want', [('vgg16',10,15.245), ('vgg16',100,15.291), ('preresnet110',10,1.14), ('preresnet164',10,1.70), ('preresnet164',100,1.73), ('wrn28x10',10,36.5)])
def test_parameter_counts(model, n_out, want):
    "VGG16: 13 convolutions have 14714688; the bottleneck networks and WRN-28-10 as commonly reported"
    net = nets[model](n_out)
    assert f'{n_params(net)/1e6:.6f}'.startswith(str(want)) or round(n_params(net)/1e6, len(str(want).split('.')[1]))==want
    if model=='vgg16': assert n_params(net)==14714688+2*(512*512+512)+512*n_out+n_out
    n_convs = sum(isinstance(m, nn.Conv2d) and m.kernel_size!=(1,1) for m in net.modules())
    n_layers = sum(isinstance(m, (nn.Conv2d,nn.Linear)) for m in net.modules())
    if model.startswith('pre'): assert n_layers-3==int(model[-3:])         # three shortcuts
    if model=='wrn28x10': assert n_layers-1==28 and n_convs==25       # its authors count the shortcuts
    if model=='vgg16': assert n_convs==13 and n_layers==16

@pytest.mark.parametrize('model,sizes', [('preresnet110',[(8,32),(16,16),(32,8)]), ('wrn28x10',[(4,32),(8,16),(16,8)])])
def test_sizes_on_the_way(model, sizes):
    net,seen,x = tiny[model](7).eval(),[],torch.randn(2,3,32,32)
    for m in net:
        x = m(x)
        if isinstance(m, cifar.PreBlock): seen.append((x.shape[1],x.shape[2]))
    assert seen==sizes and x.shape==(2,7)

def test_pre_block_by_hand():
    for ni,stride in (8,1),(5,2):
        b,x = cifar.PreBlock(ni, [(4,1,1),(4,3,stride),(8,1,1)], False),torch.randn(6,ni,8,8)
        got,y = b(x.clone()),x
        for bn,conv in zip(b.convs[::3], b.convs[2::3]): y = F.conv2d(F.relu(F.batch_norm(y, None, None, bn.weight, bn.bias, True)), conv.weight, None, conv.stride, conv.padding)
        short = x if stride==1 else F.conv2d(x, b.shortcut.weight, None, stride)    # of the input itself, without BatchNorm
        torch.testing.assert_close(got, y+short)
        assert (not [*b.shortcut.parameters()])==(stride==1)
    wide = tiny['wrn28x10'](2)
    strides = [[m.stride[0] for m in b.convs if isinstance(m, nn.Conv2d)] for b in wide if isinstance(b, cifar.PreBlock)]
    assert strides==[[1,1],[1,2],[1,2]] and all(m.bias is not None for m in wide.modules() if isinstance(m, nn.Conv2d))
    assert [m.momentum for m in wide.modules() if isinstance(m, nn.BatchNorm2d)]==[.1]*6+[.9]

def test_first_weights():
    set_seed(0)
    for net in vgg16(10, width=32),preresnet(10, 20):
        for m in net.modules():
            if not isinstance(m, nn.Conv2d) or m.weight.numel()<2000: continue
            assert m.weight.std().item()==pytest.approx((2/(m.kernel_size[0]**2*m.out_channels))**.5, rel=.1)
            assert m.bias is None or not m.bias.any()
            assert m.weight.abs().max()>2.5*m.weight.std()      # normal, not uniform
    for m in wide_resnet(10, 10, 2).modules():
        if isinstance(m, nn.Conv2d): assert m.weight.abs().max()<=m.weight[0].numel()**-.5 and m.bias.any()    # PyTorch's own
        if isinstance(m, nn.BatchNorm2d): assert (m.weight==1).all() and not m.bias.any()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in vgg16(10, width=2).modules())
    assert [m.p for m in vgg16(10, width=2).modules() if isinstance(m, nn.Dropout)]==[.5,.5]

@pytest.mark.parametrize('f,say', [(lambda: preresnet(10, 111), '9n\\+2'), (lambda: preresnet(10, 2), '9n\\+2'), (lambda: wide_resnet(10, 27), '6n\\+4'), (lambda: wide_resnet(10, 4), '6n\\+4')])
def test_impossible_depths(f, say):
    with pytest.raises(ValueError, match=say): f()

# Data

@pytest.mark.parametrize('coarse', [True,False])
def test_pixels(tmp_path, coarse):
    path = make_pictures(tmp_path/'cifar', coarse)
    for part,n,p in zip(('train','test'), (n_train,n_test), cifar_pixels(path, num_workers=0)):
        assert p.vocab==sorted(classes) and p.x.shape==(n*len(classes),3,32,32) and p.x.dtype==torch.uint8 and type(p.x) is torch.Tensor
        assert p.split_idx==(part=='test')
        want = [(Image.open(f).tobytes(),f.parent.name) for f in sorted((path/part).rglob('*.png'))]
        assert [(x.permute(1,2,0).numpy().tobytes(),p.vocab[y]) for x,y in zip(p.x, p.y)]==want

def test_pixels_decoded_by_processes(folder, pixels):
    for a,b in zip(pixels, cifar_pixels(folder, num_workers=2)): assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)

def test_unusable_data(tmp_path):
    p = tmp_path/'data'
    with pytest.raises(ValueError, match='no folder train: expected train/<class>'): cifar_pixels(p)
    (p/'train').mkdir(parents=True)
    with pytest.raises(ValueError, match='no folder test'): cifar_pixels(p)
    (p/'test').mkdir()
    with pytest.raises(ValueError, match='no pictures'): cifar_pixels(p)
    def write(o, size=32): (p/o).parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (size,size)).save(p/o)
    write('train/a/1.png'); write('train/b/1.png'); write('test/a/1.png')
    with pytest.raises(ValueError, match='same classes; only one has b'): cifar_pixels(p)
    write('test/b/1.png'); write('train/b/2.png', 16)
    with pytest.raises(ValueError, match='same size'): cifar_pixels(p, num_workers=0)

def normal(x, r): return (x.float()/255-torch.tensor(r.stats[0])[:,None,None])/torch.tensor(r.stats[1])[:,None,None]

def test_loaders(pixels):
    r = replace(recipe('vgg16','cifar100'), bs=5)
    dls = cifar_dls(pixels, r, cpu)
    sizes = [len(y) for _,y in dls.train]
    assert sizes==[5]*4+[4] and len(dls.train)==5                       # the last batch too
    ys = torch.cat([y for _,y in dls.train])
    assert torch.equal(ys.sort().values, pixels[0].y.sort().values) and not torch.equal(ys, torch.cat([y for _,y in dls.train]))
    x,y = (torch.cat(o) for o in zip(*dls.valid))
    torch.testing.assert_close(torch.Tensor(x), normal(pixels[1].x, r)) # in order, as it is
    assert torch.equal(torch.Tensor(y), pixels[1].y.float()) and len(dls.vocab)==3

def test_crops():
    set_seed(0)
    x,places = torch.randint(1, 256, (400,3,9,6), dtype=torch.uint8),{}
    ref = F.pad(x, (4,)*4)
    for o,p in zip(PadCrop()(TensorImage(x), split_idx=0), ref):
        at = [(i,j) for i in range(9) for j in range(9) if torch.equal(torch.Tensor(o), p[:,i:i+9,j:j+6].float())]
        assert len(at)==1
        places[at[0]] = places.get(at[0],0)+1
    assert len(places)==pytest.approx(81, abs=4) and max(places.values())<18
    assert PadCrop()(TensorImage(x), split_idx=1) is not None and torch.equal(PadCrop()(TensorImage(x), split_idx=1), TensorImage(x))

def test_augmented_and_normalised(pixels, monkeypatch):
    "Half of the pictures are mirrored, and padding is black before normalising"
    monkeypatch.setattr(cifar, 'PadCrop', lambda: PadCrop(0))
    r = recipe('preresnet110','cifar100')
    x = pixels[0].x[:1].repeat(400,1,1,1)
    b = torch.Tensor(cifar_dls((Pixels(x, torch.zeros(400), ['a'], 0),Pixels(x, torch.zeros(400), ['a'], 1)), replace(r, bs=400), cpu).one_batch()[0])
    want = normal(x[0], r)
    is_same,is_flip = ((b-o).abs().amax((1,2,3))<1e-4 for o in (want,want.flip(-1)))
    assert (is_same^is_flip).all() and 150<is_flip.sum()<250
    monkeypatch.undo()
    white = torch.full((64,3,8,8), 255, dtype=torch.uint8)
    b = torch.Tensor(cifar_dls((Pixels(white, torch.zeros(64), ['a'], 0),)*2, r, cpu).one_batch()[0])
    black,lit = normal(torch.zeros(3,1,1), r),normal(torch.full((3,1,1), 255.), r)
    assert (((b-black).abs()<1e-4)|((b-lit).abs()<1e-4)).all() and ((b-black).abs()<1e-4).any()

# Steps

@pytest.mark.parametrize('model', ['vgg16','preresnet110'])
def test_steps_are_those_of_torch_sgd(model, pixels):
    "Momentum, decay through it, and of biases and BatchNorm too: large enough here to be seen"
    r = replace(recipe(model,'cifar100'), wd=.2, lr=.05)
    def make(): set_seed(3); return tiny[model](3)
    learn,ref = cifar_learner(cifar_dls(pixels, r, cpu), make(), r),make()
    for m in [*learn.model.modules(),*ref.modules()]:
        if isinstance(m, nn.Dropout): m.p = 0.
    with torch.no_grad():
        for a,b in zip(learn.model.parameters(), ref.parameters()): a.add_(.01); b.add_(.01)     # biases begin at 0: nothing to decay
    opt = torch.optim.SGD(ref.parameters(), lr=r.lr, momentum=r.mom, weight_decay=r.wd)
    class ByHand(Callback):
        run_valid = False
        def after_batch(self): opt.zero_grad(); F.cross_entropy(ref(self.x), self.y).backward(); opt.step()
    with learn.no_bar(),learn.no_logging(): learn.fit(6, cbs=ByHand())
    for a,b in zip(learn.model.parameters(), ref.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
def test_half_precision(pixels, tmp_path):
    "Without CUDA fastai leaves the precision as it is, but layout and callbacks are those of a GPU"
    ws,job = [],Job('preresnet110','cifar100','swa', epochs=4, fp16=True)
    class Walk(Callback):
        order = 1000
        def after_epoch(self): ws.append([p.detach().clone() for p in self.learn.model.parameters()])
        def after_pred(self): self.last = self.learn.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    walk = Walk()
    rows = run_job(job, pixels, tmp_path, net=tiny[job.model], device=cpu, cbs=walk)
    final = tiny[job.model](3)
    final.load_state_dict(torch.load(tmp_path/job.name/'model-6.pth', weights_only=True))
    assert walk.last and len(rows)==6 and job.name.endswith('seed0-fp16-epochs4')
    for p,*o in zip(final.parameters(), *ws[2:]): torch.testing.assert_close(p.detach(), torch.stack(o).mean(0))
    assert table(results(tmp_path)).endswith('Half precision; the paper used single precision.')
    r = recipe('vgg16','cifar100')
    make = lambda **kw: cifar_learner(cifar_dls(pixels, r, cpu), tiny['vgg16'](3), r, **kw)
    assert hasattr(make(fp16=True), 'mixed_precision') and not hasattr(make(), 'mixed_precision')

# Stopping and going on

class Stop(Callback):
    def __init__(self, epoch, exc=KeyboardInterrupt, where='after_batch'):
        self.at,self.exc = epoch,exc
        setattr(self, where, self._stop)
    def _stop(self):
        if self.learn.epoch==self.at: raise self.exc('stop')

def go(job, pixels, out, **kw): return run_job(job, pixels, out, net=tiny[job.model], device=cpu, **kw)
def n_rows(job, out): h = read_history(out/job.name); return 0 if h is None else len(h['rows'])
def known(rows): return [{k:v for k,v in o.items() if k!='train_loss'} for o in rows]   # fastai's smoothed loss begins anew with each fit

jobs = [Job(m,'cifar100',method, epochs=4) for m,method in (('vgg16','swa'),('preresnet110','swa'),('preresnet110','sgd'))]

@pytest.fixture(scope='module')
def whole(pixels, tmp_path_factory):
    "Nobody stopped these"
    out = tmp_path_factory.mktemp('whole')
    return out,{job:go(job, pixels, out) for job in jobs}

interrupted = partial(pytest.raises, (KeyboardInterrupt,RuntimeError))

def check_same(job, rows, out, whole):
    ref_out,ref = whole
    assert known(rows)==known(ref[job])
    n = len(ref[job])
    names = [f'after-{n}.pth','history.json',f'model-{n}.pth']+[f'after-{n}.swa']*(job.method=='swa')
    assert sorted(o.name for o in (out/job.name).iterdir())==sorted(names)
    assert same_file(out/job.name/f'model-{n}.pth', ref_out/job.name/f'model-{n}.pth')
    a,b = (torch.load(o/job.name/f'after-{n}.pth', weights_only=False) for o in (out,ref_out))
    assert same(a['model'], b['model'])
    if job.method=='swa':
        a,b = (torch.load(o/job.name/f'after-{n}.swa', weights_only=True) for o in (out,ref_out))
        assert a['collected']==b['collected'] and a['n']==b['n'] and same(a['average'], b['average'])

@pytest.mark.parametrize('job,epoch,exc', [(jobs[0],0,KeyboardInterrupt), (jobs[0],2,RuntimeError), (jobs[0],3,KeyboardInterrupt), (jobs[1],5,RuntimeError), (jobs[2],3,KeyboardInterrupt)])
def test_stopped_in_an_epoch(job, epoch, exc, pixels, tmp_path, whole):
    with interrupted(): go(job, pixels, tmp_path, cbs=Stop(epoch, exc))
    assert n_rows(job, tmp_path)==epoch
    check_same(job, go(job, pixels, tmp_path), tmp_path, whole)

def test_stopped_twice(pixels, tmp_path, whole):
    job = jobs[1]
    for epoch in 1,4:
        with interrupted(): go(job, pixels, tmp_path, cbs=Stop(epoch))
    check_same(job, go(job, pixels, tmp_path), tmp_path, whole)

class Power:
    "Goes out at the n-th call of a function, before or after it did its work, or in the middle of it"
    def __init__(self, f, n, how): self.f,self.left,self.how = f,n,how
    def __call__(self, *args, **kw):
        self.left -= 1
        if self.left==0 and self.how=='before': raise KeyboardInterrupt
        if self.left==0 and self.how=='half': Path(args[0]).write_bytes(b'half'); raise KeyboardInterrupt
        res = self.f(*args, **kw)
        if self.left==0: raise KeyboardInterrupt
        return res

@pytest.mark.parametrize('job,name,n,how,kept', [
    (jobs[0],'learn',4,'half',3), (jobs[2],'learn',1,'half',0),      # in the model of epoch 4; of epoch 1
    (jobs[0],'swa',2,'before',3),                                      # the second average, that of epoch 4
    (jobs[0],'history',4,'before',3), (jobs[0],'text',4,'half',3), (jobs[0],'history',4,'after',4),                              # the step that makes them count
    (jobs[0],'unlink',2,'before',3), (jobs[0],'history',6,'after',6),     # tidying up; after the last epoch
    (jobs[1],'final',1,'half',6), (jobs[2],'final',1,'before',4)])                                  # the model at the end
def test_killed_while_writing(job, name, n, how, kept, pixels, tmp_path, whole, monkeypatch):
    learn_save,swa_save = cifar.Learner.save,SWA.save
    if name=='learn':   monkeypatch.setattr(cifar.Learner, 'save', lambda self, file, f=Power(lambda path, learn, file: learn_save(learn, file), n, how): f(self.path/f'{file}.pth', self, file))
    if name=='swa':     monkeypatch.setattr(SWA, 'save', lambda self, file, f=Power(lambda file, swa: swa_save(swa, file), n, how): f(file, self))
    if name=='history': monkeypatch.setattr(cifar, '_write_json', Power(cifar._write_json, n, how))
    if name=='text':    monkeypatch.setattr(Path, 'write_text', lambda self, *a, f=Power(Path.write_text, n, how), **kw: f(self, *a, **kw))
    if name=='unlink':  monkeypatch.setattr(Path, 'unlink', lambda self, f=Power(Path.unlink, n, how): f(self))
    if name=='final':   monkeypatch.setattr(cifar, 'save_model', Power(cifar.save_model, n, how))
    with interrupted(): go(job, pixels, tmp_path)
    monkeypatch.undo()
    assert n_rows(job, tmp_path)==kept
    check_same(job, go(job, pixels, tmp_path), tmp_path, whole)

def go_until_killed(job, pixels, out, threads):
    "In a process of its own, with as many threads, as a fork would have none but one"
    torch.set_num_threads(threads)
    cifar._write_json = Power(cifar._write_json, 4, 'before')
    try: go(job, pixels, out)
    except KeyboardInterrupt: os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_kill_9(pixels, tmp_path, whole):
    "A real one, between the two files and the history of epoch 4"
    job = jobs[0]
    child = multiprocessing.get_context('spawn').Process(target=go_until_killed, args=(job, pixels, tmp_path, torch.get_num_threads()))
    child.start()
    child.join(120)
    child.kill()                         # should it hang
    assert child.exitcode==-signal.SIGKILL
    assert len(read_history(tmp_path/job.name)['rows'])==3 and {'after-3.pth','after-3.swa','after-4.pth','after-4.swa'}<={o.name for o in (tmp_path/job.name).iterdir()}
    check_same(job, go(job, pixels, tmp_path), tmp_path, whole)

def test_budget_extended(pixels, tmp_path, whole):
    "One budget and then half a one more is one and a half"
    job = jobs[0]
    rows = go(job, pixels, tmp_path, budget=1)
    assert len(rows)==4 and known(rows)==known(whole[1][job][:4]) and (tmp_path/job.name/'model-4.pth').exists()
    rows = go(job, pixels, tmp_path, budget=1.5)
    (tmp_path/job.name/'model-4.pth').unlink()
    check_same(job, rows, tmp_path, whole)
    was = {o.name:o.stat().st_mtime_ns for o in (tmp_path/job.name).iterdir()}
    assert known(go(job, pixels, tmp_path, budget=1.25, cbs=Stop(0)))==known(rows[:5]) and go(job, pixels, tmp_path, cbs=Stop(0))==rows     # nothing left to do
    assert was=={o.name:o.stat().st_mtime_ns for o in (tmp_path/job.name).iterdir()}

def test_what_was_random_before_does_not_matter(pixels, tmp_path, whole):
    torch.rand(7),np.random.rand(7),random.random()
    check_same(jobs[0], go(jobs[0], pixels, tmp_path), tmp_path, whole)

def test_seeds_differ(pixels, tmp_path, whole):
    job = replace(jobs[1], seed=1)
    assert [o['valid_loss'] for o in go(job, pixels, tmp_path)]!=[o['valid_loss'] for o in whole[1][jobs[1]]]

def test_epochs_differ(pixels, tmp_path):
    "Each has an order and an augmentation of its own"
    seen = []
    class Keep(Callback):
        run_valid = False
        def before_batch(self): seen.append((self.learn.x.sum((1,2,3)).tolist(), self.learn.y.tolist()))
    go(replace(jobs[2], seed=2), pixels, tmp_path, cbs=Keep())
    assert len({str(y) for _,y in seen})==len({str(sorted(x)) for x,_ in seen})==4

def test_folder_of_something_else(pixels, tmp_path):
    go(jobs[1], pixels, tmp_path, cbs=[])
    fewer = Pixels(pixels[0].x[:-1], pixels[0].y[:-1], pixels[0].vocab, 0),pixels[1]
    with pytest.raises(ValueError, match='n_train 24, now 23.*--out, or --fresh'): go(jobs[1], fewer, tmp_path)
    for o in Job('vgg16','cifar100','swa', seed=1),Job('vgg16','cifar10','swa'),Job('vgg16','cifar100','sgd'),Job('vgg16','cifar100','swa', epochs=9): assert o.name!=Job('vgg16','cifar100','swa').name

# Results

def test_results_are_what_the_models_do(pixels, whole):
    out,rows = whole
    res = {(o['model'],o['row']):o for o in results(out)}
    assert set(res)=={('vgg16',k) for k in labels if k!='SGD'}|{('preresnet110',k) for k in labels}
    for job in jobs:
        label,n = list(job.marks().items())[-1]
        net = tiny[job.model](3)
        net.load_state_dict(torch.load(out/job.name/f'model-{n}.pth', weights_only=True))
        with torch.no_grad(): pred = net.eval()(normal(pixels[1].x, job.recipe))
        o = res[job.model,label]
        assert o['accuracy']==pytest.approx(100*(pred.argmax(1)==pixels[1].y).float().mean().item(), abs=1e-3) and o['at_epoch']==n
        assert o['loss']==pytest.approx(F.cross_entropy(pred, pixels[1].y).item(), abs=1e-4)
        assert (o['paper'],o['paper_sd'])==paper[job.model,'cifar100'][label]
    assert [res['preresnet110',k]['at_epoch'] for k in labels]==[4,4,5,6]

def test_bn_of_the_final_average_is_measured(whole):
    out,_ = whole
    n,job = 6,jobs[1]
    final,last = (torch.load(out/job.name/f, weights_only=False) for f in ('model-6.pth','after-6.pth'))
    assert any(not torch.equal(final[k], last['model'][k]) for k in final if k.endswith('running_mean'))

def row(label, acc, seed=0, **kw):
    p = paper['vgg16','cifar100'][label]
    return dict(model='vgg16', data='cifar100', method=label[:3].lower(), seed=seed, epochs=None, fp16=False, n_train=50000, n_test=10000, classes=100, row=label,
                at_epoch=200, accuracy=acc, loss=1., paper=p[0], paper_sd=p[1]) | kw

def test_table():
    res = [row('SWA 1', 73.91), row('SGD', 72., 0), row('SGD', 73., 1)]
    lines = table(res).splitlines()
    assert lines[0]=='vgg16 on cifar100, test accuracy in %' and lines[1].split()==['epochs','paper','ours','difference']
    assert lines[2].split()=='SGD 200 72.55 ± 0.10 72.50 ± 0.71 -0.05'.split() and lines[3].split()=='SWA 1 200 73.91 ± 0.12 73.91 +0.00'.split()
    assert len({len(o) for o in lines[1:4]})==1 and lines[4:]==['± is the standard deviation, ours over 2 runs.']
    assert len(table(res[:1]).splitlines())==3

@pytest.mark.parametrize('kw,say', [(dict(epochs=4),'One budget was 4 epochs here, it is 200'), (dict(n_train=49999),'49999 training'), (dict(classes=20),'20 classes'), (dict(fp16=True),'Half precision')])
def test_table_says_what_differs(kw, say):
    assert say in table([row('SGD', 72., **kw)]) and (('cannot be compared' in table([row('SGD', 72., **kw)]))!=('fp16' in kw))
    assert len(table([row('SGD', 72., epochs=200)]).splitlines())==3

@pytest.mark.parametrize('width', [40,60,80])
def test_table_on_narrow_screens(width):
    res = [row('SWA 1', 73.91, epochs=4, n_train=49999), row('SGD', 72., 0, epochs=4, n_train=49999), row('SGD', 73., 1, epochs=4, n_train=49999)]
    lines = table(res, width).splitlines()
    assert max(map(len, lines))<=width and lines[0]=='vgg16 on cifar100, test accuracy in %'
    assert ' '.join(table(res, width).split()).endswith(' '.join(table(res).splitlines()[4:]))
    if width==40: assert lines[1:6]==['SGD', '  epochs      200', '  paper       72.55 ± 0.10', '  ours        72.50 ± 0.71', '  difference  -0.05']

# The command line

args = '--model preresnet110 --data cifar100 --epochs 4'.split()

def test_main(folder, pixels, tmp_path, capsys, small, whole, monkeypatch):
    monkeypatch.setenv('COLUMNS', '96')                                  # whatever the screen that the tests run on
    assert main([*args,'--path',str(folder),'--out',str(tmp_path/'o'),'--runs','2','--seed','0']) is None
    text = capsys.readouterr().out
    res = json.loads((tmp_path/'o/results.json').read_text())
    assert {(o['row'],o['seed']) for o in res}=={(k,s) for k in labels for s in (0,1)} and 'NaN' not in (tmp_path/'o/results.json').read_text()
    assert table(res, 96) in text
    words = ' '.join(text.split())
    for o in 'cannot be compared','ours over 2 runs','24 training and 12 test pictures of 3 classes': assert o in words
    assert text.count('swa_accuracy')==2 and '\r' not in text            # a line for each epoch, no bar, as this is no terminal
    assert sum(o.split()[:1]==['5'] for o in text.splitlines())==2
    for job in jobs[1:]: check_same(job, read_history(tmp_path/'o'/job.name)['rows'], tmp_path/'o', whole)
    main([*args,'--path',str(folder),'--out',str(tmp_path/'o'),'--method','swa','--budget','1.25'])
    text = capsys.readouterr().out
    assert 'SWA 1.25' in text and 'SWA 1.5' not in text and 'SGD' not in text and 'swa_accuracy' not in text   # nothing trained

def test_main_goes_on(folder, tmp_path, capsys, small, monkeypatch, whole):
    line = [*args,'--path',str(folder),'--out',str(tmp_path),'--method','swa']
    orig,job = cifar.run_job,jobs[1]
    monkeypatch.setattr(cifar, 'run_job', lambda *a, cbs=None, **kw: orig(*a, cbs=Stop(3), **kw))
    assert main(line)==130 and 'interrupted; the same command goes on' in capsys.readouterr().err
    monkeypatch.setattr(cifar, 'run_job', orig)
    main(line)
    text = capsys.readouterr().out
    assert f'{job.name}: going on after epoch 3 of 6 (--fresh begins anew)' in text
    assert [o.split()[0] for o in text.splitlines() if o.split() and o.split()[0] in '012345'][:3]==['3','4','5']     # nothing shown of what was done before
    check_same(job, read_history(tmp_path/job.name)['rows'], tmp_path, whole)
    monkeypatch.setattr(cifar, 'run_job', lambda *a, cbs=None, **kw: orig(*a, cbs=Stop(1), **kw))
    assert main([*line,'--fresh'])==130 and n_rows(job, tmp_path)==1 and 'command without --fresh goes on' in capsys.readouterr().err
    monkeypatch.setattr(cifar, 'run_job', orig)
    main([*line,'--fresh'])
    text = capsys.readouterr().out
    assert 'going on' not in text and sum('0.' in o and o.split()[0] in list('012345') for o in text.splitlines() if o.split())>=6
    check_same(job, read_history(tmp_path/job.name)['rows'], tmp_path, whole)

def test_bar_in_a_terminal(folder, tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    for budget,n in ('1',4),('1.25',5):
        main([*args,'--path',str(folder),'--out',str(tmp_path),'--method','swa','--budget',budget])
        assert f'Epoch {n}/{n}' in capsys.readouterr().out

@pytest.mark.parametrize('data,url,coarse', [('cifar10','CIFAR',False), ('cifar100','CIFAR_100',True)])
def test_fetched_by_fastai(data, url, coarse, tmp_path, monkeypatch, small, capsys):
    "An archive of the same layout, through `untar_data`"
    make_pictures(tmp_path/data, coarse)
    with tarfile.open(tmp_path/f'{data}.tgz', 'w:gz') as f: f.add(tmp_path/data, data)
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    fastai_cfg.cache_clear()
    try:
        assert cifar._urls[data]==getattr(URLs, url)
        monkeypatch.setitem(cifar._urls, data, (tmp_path/f'{data}.tgz').as_uri())
        main(['--model','preresnet110','--data',data,'--method','sgd','--epochs','4','--out',str(tmp_path/'o')])
        res = json.loads((tmp_path/'o/results.json').read_text())
        assert [(o['row'],o['n_train'],o['n_test'],o['classes'],o['data']) for o in res]==[('SGD',24,12,3,data)] and (tmp_path/'home/data'/data/'train').is_dir()
    finally: fastai_cfg.cache_clear()

def test_cannot_be_fetched(tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    fastai_cfg.cache_clear()
    try:
        monkeypatch.setitem(cifar._urls, 'cifar10', (tmp_path/'cifar10.tgz').as_uri())
        with pytest.raises(SystemExit) as e: main(['--data','cifar10','--out',str(tmp_path/'o')])
        err = capsys.readouterr().err
        assert e.value.code==2 and err.count('\n')==1 and 'cannot fetch cifar10' in err and '--path' in err and not (tmp_path/'o').exists()
    finally: fastai_cfg.cache_clear()

@pytest.fixture
def no_training(monkeypatch):
    def stop(*args, **kw): raise AssertionError('training began')
    monkeypatch.setattr(cifar, 'run_job', stop)

@pytest.mark.parametrize('line,say', [('--model vgg19','invalid choice'), ('--data cifar','invalid choice'), ('--method swag','invalid choice'), ('--budget 2','1, 1.25 or 1.5'), ('--budget x','1, 1.25 or 1.5'),
    ('--runs 0','1 or more'), ('--runs 1.5','whole number'), ('--seed -1','0 or more'), ('--epochs 3','4 or more'), ('--epochs many','whole number'), ('--path nowhere','no folder train'),
    ('--out afile','not a folder'), ('--out afile/o','not a folder'), ('--path empty','no folder train'), ('more','more'), ('--fp16','needs a GPU')])
def test_bad_values(line, say, no_training, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (tmp_path/'afile').write_text('')
    (tmp_path/'empty').mkdir()
    with pytest.raises(SystemExit) as e: main(line.split())
    out,err = capsys.readouterr()
    assert e.value.code==2 and out=='' and err.count('\n')==1 and err.startswith('fastswa_cifar: ') and say in err
    assert sorted(o.name for o in tmp_path.iterdir())==['afile','empty']

def test_other_data_is_refused_before_training(folder, pixels, tmp_path, capsys, no_training, monkeypatch):
    job,line = replace(jobs[1], seed=1),[*args,'--path',str(folder),'--out',str(tmp_path),'--runs','2']
    run_job(job, (Pixels(pixels[0].x[:-1], pixels[0].y[:-1], pixels[0].vocab, 0),pixels[1]), tmp_path, budget=1, net=tiny['preresnet110'], device=cpu)
    with pytest.raises(SystemExit): main(line)
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'n_train 23, now 24' in err
    with pytest.raises(AssertionError, match='training began'): main([*line,'--fresh'])
    assert not (tmp_path/job.name).exists()

def test_defaults(no_training, monkeypatch, tmp_path, folder):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar, 'untar_data', lambda url: asked.append(url) or folder)
    def stop(jobs, pixels, out, *a): asked.append((jobs,out,*a)); raise KeyboardInterrupt
    monkeypatch.setattr(cifar, 'run_all', stop)
    assert main([])==130
    assert asked==[URLs.CIFAR_100, ([Job('vgg16','cifar100',m) for m in ('sgd','swa')],'fastswa_cifar' if isinstance(asked[1][1],str) else Path('fastswa_cifar'),1.5,False,'lines')]

def test_help(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    out = capsys.readouterr().out
    assert e.value.code==0 and all(o in out for o in '--model --data --method --budget --runs --seed --path --out --epochs --fp16 --fresh'.split())

def test_command_is_installed():
    r = subprocess.run([sys.executable,'-c','import setuptools\nsetuptools.setup = lambda **kw: print(kw["entry_points"]["console_scripts"])\nimport runpy; runpy.run_path("setup.py")'], cwd=root, capture_output=True, text=True)
    assert r.stdout.strip()=="['fastswa_demo=fastswa.commands:demo', 'fastswa_cifar=fastswa.commands:cifar', 'fastswa_average=fastswa.commands:average']", r.stdout+r.stderr
