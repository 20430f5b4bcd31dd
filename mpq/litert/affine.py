"""What follows a product channel by channel, taken into it: a norm's scale and shift, a bias, a rectifier.

A product stays unwritten (`Affine`) while the model scales its channels or adds to them by constants; what it is then
is one operator with a bias and an activation function, instead of one operator for each step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from mpq.export.jaxprs import Known, shape_of
from mpq.litert.activations import Codes

Make = Callable[["Affine", Codes | None], int]

NONE, RELU, RELU6 = 0, 1, 3
"""Of `ActivationFunctionType`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """`act(product * scale + shift)`, channels last.

    Attributes:
      make: this, and how it is rounded, or None -> number of the tensor.
      integer: whether it can be an int8 tensor without being a float32 one first.
      scale, shift: `float64[channels]`.
      act: `NONE`, `RELU` or `RELU6`.
      bias: the parameter that was added last, and what the shift gains where that grows by 1, `float64[channels]`.
    """

    make: Make
    scale: np.ndarray
    shift: np.ndarray
    act: int = NONE
    integer: bool = False
    bias: tuple[str, np.ndarray] | None = None

    @classmethod
    def of(cls, channels: int, make: Make, integer: bool = False) -> Self:
        """The product itself."""
        return cls(make, np.ones(channels), np.zeros(channels), integer=integer)

    def emit(self, codes: Codes | None = None) -> int:
        """Write it, rounded to `codes` if there are some; the same one twice is one."""
        return self.make(self, codes)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """`act(a + b)` of a product and a value that is rounded already, not written yet.

    Attributes:
      product: one summand.
      other: the other one's int8 tensor.
      codes: how that is rounded.
      shape: of the sum.
      act: `NONE` or `RELU`.
    """

    product: Affine
    other: int
    codes: Codes
    shape: tuple[Any, ...]
    act: int = NONE


def affine(eqn: Any, values: list[Any]) -> Affine | None:
    """What an equation makes of an `Affine`, where that is one again; else None."""
    places = [i for i, value in enumerate(values) if isinstance(value, Affine)]
    if len(places) != 1 or len(values) != 2:
        return None
    (place,), name = places, eqn.primitive.name
    before: Affine = values[place]
    channels = len(before.scale)
    other = values[1 - place]
    if not isinstance(other, np.ndarray) or shape_of(eqn.invars[place]) != shape_of(eqn.outvars[0]):
        return None
    if name in ("max", "min"):
        return _rectified(before, name, other)
    if before.act != NONE or other.size not in (1, channels) or (other.ndim and other.shape[-1] not in (1, channels)):
        return None
    if other.size == channels and other.shape[-1] != channels:
        return None
    by = np.broadcast_to(np.asarray(other).reshape(-1), channels).astype(np.float64)
    if name == "add" or (name == "sub" and place == 0):
        sign = 1.0 if name == "add" else -1.0
        path = other.path if isinstance(other, Known) and other.size == channels else None
        bias = before.bias if path is None else (path, np.full(channels, sign))
        return dataclasses.replace(before, shift=before.shift + sign * by, bias=bias)
    if name == "mul":
        return _scaled(before, by)
    if name == "div" and place == 0 and by.all():
        return _scaled(before, 1 / by)
    return None


def _scaled(before: Affine, by: np.ndarray) -> Affine:
    bias = before.bias and (before.bias[0], before.bias[1] * by)
    return dataclasses.replace(before, scale=before.scale * by, shift=before.shift * by, bias=bias)


def _rectified(before: Affine, name: str, limit: np.ndarray) -> Affine | None:
    if limit.size != 1:
        return None
    if (name, before.act, float(limit.reshape(()))) == ("max", NONE, 0.0):
        return dataclasses.replace(before, act=RELU)
    if (name, before.act, float(limit.reshape(()))) == ("min", RELU, 6.0):
        return dataclasses.replace(before, act=RELU6)
    return None
