"`learn.fit(3, cbs=SWA())` on the learners people have, and `learn.predict` right after it"
import pytest, torch
from common import *
from fastswa.all import *
import pandas as pd

def vision(tmp_path):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImage, Resize, aug_transforms, resnet18, vision_learner
    imgs = (X[:60,0]*255).byte()[...,None].expand(-1,-1,-1,3).numpy()
    dls = DataBlock((ImageBlock(PILImage), CategoryBlock), get_x=lambda i: imgs[i], get_y=lambda i: int(Y[i]), splitter=IndexSplitter(list(range(40,60))),
                    item_tfms=Resize(32), batch_tfms=aug_transforms(do_flip=False)).dataloaders(list(range(60)), bs=10, num_workers=0)
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path),imgs[0]

def tabular(tmp_path):
    from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(a=np.random.randn(120), b=np.random.randn(120), c=np.random.choice(list('xyz'),120), y=np.random.choice(['no','yes'],120)))
    dls = TabularDataLoaders.from_df(df, path=tmp_path, procs=[Categorify,FillMissing,Normalize], cat_names=['c'], cont_names=['a','b'], y_names='y',
                                     y_block=CategoryBlock(), valid_idx=list(range(90,120)), bs=16)
    return tabular_learner(dls, layers=[20,10], n_out=2, metrics=accuracy),df.iloc[0]

def text(tmp_path):
    from fastai.text.all import AWD_LSTM, TextDataLoaders, text_classifier_learner, awd_lstm_clas_config
    words = 'the film was great good awful bad boring a fine plot with poor acting and more'.split()
    df = pd.DataFrame(dict(text=[' '.join(np.random.choice(words, 12)) for _ in range(80)], label=np.random.choice(['neg','pos'],80)))
    dls = TextDataLoaders.from_df(df, path=tmp_path, text_col='text', label_col='label', valid_pct=.25, bs=8, seed=1, seq_len=16)
    cfg = {**awd_lstm_clas_config, 'emb_sz':20, 'n_hid':30, 'n_layers':2}
    return text_classifier_learner(dls, AWD_LSTM, config=cfg, pretrained=False, metrics=accuracy, path=tmp_path),'a good film with a fine plot'

def torch_loaders(tmp_path):
    ds = torch.utils.data.TensorDataset(X[:80],Y[:80])
    return Learner(DataLoaders(torch.utils.data.DataLoader(ds, 16, shuffle=True), torch.utils.data.DataLoader(ds, 16)), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy),None

@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_swa','fine_tune'])
@pytest.mark.parametrize('make', [vision, tabular, text, torch_loaders])
def test_fit_and_predict(make, method, tmp_path):
    seed()
    learn,item = make(tmp_path)
    swa,spy = SWA(eval_every=1),Spy()
    with learn.no_bar(), learn.no_logging():
        if method=='fit_swa': swa = learn.fit_swa(3, eval_every=1, cbs=spy)
        else: getattr(learn, method)(3, cbs=[swa,spy])
        assert swa.n_averaged>=3 and not [cb for cb in learn.cbs if isinstance(cb, SWA)]
        for p,m in zip(learn.model.parameters(), spy.mean(swa.collected)): torch.testing.assert_close(p.detach().double(), m, atol=2e-6, rtol=1e-5)
        last,names = learn.recorder.values[-1],list(learn.recorder.metric_names[1:])
        want = [last[names.index(o)] for o in ('swa_loss','swa_accuracy')]
        np.testing.assert_allclose(learn.validate(), want, rtol=1e-5)            # validate repeats the last columns
        if item is not None:
            probs = learn.predict(item)[2]
            swa.restore(learn); before = learn.predict(item)[2]; swa.apply(learn)
            assert not torch.equal(probs, before) and torch.equal(learn.predict(item)[2], probs)
