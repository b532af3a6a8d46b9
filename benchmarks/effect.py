"""Does averaging still help? `python benchmarks/effect.py`

Ends with 1 unless SWA's test loss is below SGD's on each of three seeds, and by .03 on average."""
# The loss and not the accuracy: on one seed the accuracy can go the wrong way while the loss gains. Expected are .06.
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # this checkout
import torch
from fastswa.demo import run_seed

def main(seeds=(100,101,102), least=.03):
    torch.set_num_threads(1)
    gains = []
    for seed in seeds:
        sgd,swa = (o.scores for o in run_seed(seed)[:2])
        gains.append(sgd['test_loss']-swa['test_loss'])
        print(f'seed {seed}: test loss {sgd["test_loss"]:.3f} -> {swa["test_loss"]:.3f} (gain {gains[-1]:+.3f})   '
              f'accuracy {100*sgd["accuracy"]:.2f} -> {100*swa["accuracy"]:.2f} %   '
              f'training loss {sgd["train_loss"]:.3f} -> {swa["train_loss"]:.3f}', flush=True)
    ok = min(gains)>0 and mean(gains)>=least
    print(f'mean gain {mean(gains):.3f}, at least {least} wanted and none below 0: '+('held' if ok else 'NOT HELD'))
    return 0 if ok else 1

if __name__=='__main__': sys.exit(main())
