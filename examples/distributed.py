"""SWA on several GPUs, of one machine or of more; to try it without any, in several processes on the CPU. Start it with one of

    torchrun --standalone --nproc_per_node 2 examples/distributed.py
    accelerate launch --multi_gpu --num_processes 2 examples/distributed.py

(`--multi_gpu` also where there is no GPU). A distributed fit of fastai needs accelerate: `pip install accelerate`.

Sharing out the data and the gradients is the business of fastai and accelerate. SWA is a callback, here as in any other fit. Each process
measures BatchNorm statistics on its part of the training data, these are put together, and all processes end with the same averaged model."""
import argparse
from fastai.basics import *
from fastai.distributed import *
from fastai.layers import ConvLayer
from fastswa.all import *
from sklearn.datasets import load_digits

def make_learner(bs):
    digits = load_digits()
    items = list(zip(tensor(digits.images/16).float()[:,None], tensor(digits.target)))
    model = nn.Sequential(ConvLayer(1, 16, stride=2), ConvLayer(16, 32, stride=2), nn.Flatten(), nn.Linear(128,10))
    return Learner(DataLoaders.from_dsets(items[:1280], items[1280:], bs=bs), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def broadcast_on_cpu(self, t, rank):
    "fastai's distributed loader sends the order of the items by way of a GPU. This goes without"
    t = tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--bs', type=int, default=32, help='batch size of each process')
    parser.add_argument('--save', type=Path, help='folder in which to save models/averaged.pth')
    args = parser.parse_args()

    cpu = not torch.cuda.is_available()
    if cpu: DistributedDL._broadcast = broadcast_on_cpu
    set_seed(42)
    learn,swa = make_learner(args.bs),SWA(start=.5, eval_every=1)
    with learn.distrib_ctx(sync_bn=not cpu, cpu=cpu):                # SyncBatchNorm is for GPUs only
        learn.fit(args.epochs, cbs=swa)
        loss,acc = learn.validate()                                  # the averaged model, by all processes together
        if args.save:
            learn.path = args.save.absolute()
            learn.save('averaged')                                   # only the first process writes
    if not rank_distrib(): print(f'{max(num_distrib(), 1)} processes, {swa.n_averaged} snapshots averaged: loss {loss:.4f}, accuracy {acc:.4f}')
    teardown_distrib()
