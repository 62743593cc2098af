"""Slow, obviously right versions, in float64, with nothing from the package but names.

Everything is derived with autograd from the network itself: patches as the derivative of a layer's output by its
weights, output metrics as the Hessian of the loss, Jacobians example by example.
"""

from tests.support.oracles.blocks import *  # noqa: F403
from tests.support.oracles.estimators import *  # noqa: F403
from tests.support.oracles.one_layer import *  # noqa: F403
from tests.support.oracles.uses import *  # noqa: F403
