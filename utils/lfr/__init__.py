"""Local Flatness Regularization (arXiv 1910.12165). Needs torch and nothing else of the repository.

    from lfr import Ball, lfr_loss      # installed by pip, or this folder copied as `lfr`

`loss.py` is the method, `ball.py` the eps-ball and the ascent in it, `batch_norm.py` says which
statistics BatchNorm uses where, `accel.py` makes it fast.
"""

from .ball import NORMS, Ball, ascend
from .batch_norm import BN_MODES
from .loss import SEARCHES, LossTerms, flatness, initial_point, inner_maximization, input_gradient
from .loss import lfr_loss as lfr_loss
