"Stochastic Weight Averaging for fastai"
__version__ = "0.5.0"
