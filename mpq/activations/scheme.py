"""How activations and cache entries are rounded while the model runs, and the text form of that.

Of every group of values that shares a scale, with b bits, lo = min(0, min x) and hi = max(0, max x):

    symmetric    s = fp16(max |x| / (2^(b-1) - 1))   x' = s clip(round(x/s), 1 - 2^(b-1), 2^(b-1) - 1)
    asymmetric   s = fp16((hi - lo) / (2^b - 1))     x' = s (clip(round(x/s) + z, 0, 2^b - 1) - z),  z = round(-lo/s)

Ranges are dynamic: those of the very values that are rounded, which needs no calibration. 0 stays 0. It is the dynamic
per-token quantization of ZeroQuant (Yao et al. 2022, arXiv:2206.01861) and the integer affine mapping of
Jacob et al. 2018 (arXiv:1712.05877, eq. 1), simulated in float32. Nothing is executed in integers.

Cost: a few operations for every value.
Fails on: single values far above the rest of their group, which leave it few levels; that is what the scores measure.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpq.quantize.rounding import round_scale
from mpq.types import MpqError

GRANULARITIES = ("token", "head", "tensor")
SCALE_DTYPE = "float16"
"""Of stored scales, as in `mpq.types.Scheme`."""

_SCALE_BITS = 16
_TEXT = re.compile(r"int(?P<bits>[2-8])_(?P<granularity>token|head|tensor)(?P<asymmetric>_asym)?")


class Kind(NamedTuple):
    """All of a scheme but its bits: what decides the program, where bits are only a number in it."""

    granularity: str
    asymmetric: bool


@dataclasses.dataclass(frozen=True)
class ActivationScheme:
    """How one activation is rounded. `str()` is its text form, such as `int8_token`, `int4_head_asym`.

    Attributes:
      bits: of every value, 2 to 8.
      granularity: what shares a scale. `token`: all features of a position. `head`: those of one attention head, of
        keys and values. `tensor`: all real positions of a window, the input of one request.
      asymmetric: with a zero point.
    """

    bits: int
    granularity: str
    asymmetric: bool = False

    def __str__(self) -> str:
        return f"int{self.bits}_{self.granularity}{'_asym' if self.asymmetric else ''}"

    @property
    def kind(self) -> Kind:
        """The scheme without its bits."""
        return Kind(self.granularity, self.asymmetric)

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative, or 0 if asymmetric."""
        return 2**self.bits - 1 if self.asymmetric else 2 ** (self.bits - 1) - 1

    def size_bits(self, values: int, groups: int) -> int:
        """Bits of `values` codes with `groups` scales and, if asymmetric, zero points."""
        return values * self.bits + groups * (_SCALE_BITS + (self.bits if self.asymmetric else 0))


def parse_activation_scheme(text: str) -> ActivationScheme:
    """The scheme that `text` names; `str()` of the result gives `text` back.

    Raises:
      MpqError: the text is not of the form intB_GRANULARITY[_asym].
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise MpqError(
            f"unknown activation scheme {text!r}: allowed is int2 to int8 with _{', _'.join(GRANULARITIES)}, and _asym "
            "for a zero point: int8_token, int4_head_asym"
        )
    return ActivationScheme(int(match["bits"]), match["granularity"], match["asymmetric"] is not None)


def fake_quantize(x: jax.Array, kind: Kind, top: Any, *, heads: int, real: jax.Array) -> jax.Array:
    """`x` rounded and scaled back, by the formulas of the module's docstring.

    Args:
      x: `[batch, positions, width]`; the positions of a window are neighbours.
      kind: what shares a scale, and whether there is a zero point.
      top: the largest code, `ActivationScheme.top`; it may be traced, so that one program serves all bits.
      heads: parts of `width` for granularity `head`.
      real: `bool[windows, time]`, or `bool[windows]`; padding is not part of a tensor. Where the positions of a window
        are not its `time`, all positions of a window with anything real are.

    Returns:
      Of the shape and dtype of `x`.

    Raises:
      MpqError: the positions cannot be divided among the windows, whose tensors are wanted.
    """
    batch, positions, width = x.shape
    windows = len(real)
    values = x.astype(jnp.float32)
    inside = values
    if kind.granularity == "tensor":
        if positions % windows:
            raise MpqError(f"{positions} positions are not those of {windows} windows: use a scale for every token")
        rows = real if real.ndim == 2 and real.size == positions else real.reshape(windows, -1).any(axis=1)[:, None]
        counted = jnp.broadcast_to(rows, (windows, positions // windows)).reshape(-1, 1)
        inside = jnp.where(counted, values, 0.0)
    groups = {
        "token": (batch, positions, 1, width),
        "head": (batch, positions, heads, width // max(heads, 1)),
        "tensor": (batch, windows, 1, positions // windows * width),
    }[kind.granularity]
    low = inside.reshape(groups).min(axis=-1, keepdims=True, initial=0.0)
    high = inside.reshape(groups).max(axis=-1, keepdims=True, initial=0.0)
    top = jnp.asarray(top, jnp.float32)
    span = high - low if kind.asymmetric else jnp.maximum(high, -low)
    scale = round_scale(span / top, SCALE_DTYPE)
    zero, least = (jnp.round(-low / scale), 0.0) if kind.asymmetric else (0.0, -top)
    codes = jnp.clip(jnp.round(values.reshape(groups) / scale) + zero, least, top) - zero
    return (codes * scale).reshape(x.shape).astype(x.dtype)
