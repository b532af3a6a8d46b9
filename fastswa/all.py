"Everything at once: `from fastswa.all import *` beside `from fastai.vision.all import *`"
from .average import *
from .schedule import *
from .batchnorm import *
from .callback import *
from .ema import *
from .lawa import *
from .ensemble import *
from .snapshots import *
from .swag import *
from .landscape import *
from .calibration import *
from .soups import *
from .resume import *
