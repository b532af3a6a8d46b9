"Stochastic Weight Averaging for fastai"
__version__ = "0.7.0"
