"""How activations and cache entries are rounded while the model runs, and the text form of that.

Of every group of values that shares a scale, with b bits, lo = min(0, min x) and hi = max(0, max x):

    symmetric    s = fp16(max |x| / (2^(b-1) - 1))   x' = s clip(round(x/s), 1 - 2^(b-1), 2^(b-1) - 1)
    asymmetric   s = fp16((hi - lo) / (2^b - 1))     x' = s (clip(round(x/s) + z, 0, 2^b - 1) - z),  z = round(-lo/s)
    fp8_e4m3     s = fp16(max |x| / 448)             x' = s e4m3(clip(x/s, -448, 448))

with e4m3 the nearest number of 4 bits of exponent and 3 of mantissa, ties to even (Micikevicius et al. 2022,
arXiv:2209.05433, table 1; the variant without infinities). A group (`_gN`) is N neighbouring features of a position,
the last of a position perhaps fewer. A *dynamic* range is that of the very values that are rounded, which needs no
calibration. A *static* one, [lo, hi], was chosen from calibration data by a method of `mpq.activations.clip`; values
beyond it are clipped. 0 stays 0. It is the dynamic per-token quantization of ZeroQuant (Yao et al. 2022,
arXiv:2206.01861) and the integer affine mapping of Jacob et al. 2018 (arXiv:1712.05877, eq. 1), simulated in float32;
`mpq.packed` executes it in integers. FP8 is multiplied in floating point everywhere.

With *outliers* (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339, section 3.2) a feature with a value of magnitude
`threshold` or more stays in floating point at all positions, where dequantized weights multiply it, and only the others
are rounded, by ranges of their own. Which features, is found in the positions of every window as it comes, or was in
calibration (`_static`). Differences from the paper, and from bitsandbytes: a window is what a call is there, so that
others beside it change nothing; bitsandbytes has the small values of such a feature in the range of their token still.

Cost: a few operations for every value; of a dynamic range a reduction beside them; of outliers a second product.
Fails on: single values far above the rest of their group, which leave it few levels; that is what the scores measure.
Outliers that are found as they come depend on all positions of a window: later ones, and padding where it is not told.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpq.quantize.rounding import round_scale
from mpq.types import MpqError

GRANULARITIES = ("token", "head", "tensor")
"""Beside groups of features, which are written with their size: `_g32`."""

FP8 = "fp8_e4m3"
FP8_TOP = 448
SCALE_DTYPE = "float16"
"""Of stored scales, as in `mpq.types.Scheme`."""

METHODS = ("mse", "absmax", "moving_average", "percentile", "entropy")
"""How a static range is chosen, see `mpq.activations.clip`; the first is meant where a text names none."""

_SCALE_BITS = 16
_TEXT = re.compile(
    rf"(int(?P<bits>[2-8])|{FP8})_(?P<granularity>token|head|tensor|g(?P<size>[1-9]\d*))"
    rf"(?P<static>_static(_(?P<method>{'|'.join(METHODS)}))?)?(?P<asymmetric>_asym)?"
    r"(_outlier(?P<threshold>[1-9]\d*(\.\d*[1-9])?|0\.\d*[1-9])(?P<fixed>_static)?)?"
)


class Kind(NamedTuple):
    """All of a scheme but its bits: what decides the program, where bits are only a number in it."""

    granularity: str
    asymmetric: bool
    static: bool = False
    threshold: float = 0.0
    fixed: bool = False
    group_size: int = 0
    minifloat: bool = False


@dataclasses.dataclass(frozen=True)
class ActivationScheme:
    """How one activation is rounded. `str()` is its text form, such as `int8_token`, `int4_head_asym`.

    Attributes:
      bits: of every value, 2 to 8.
      granularity: what shares a scale. `token`: all features of a position. `group`: so many neighbours of them.
        `head`: those of one attention head, of keys and values. `tensor`: all real positions of a window, the input of
        one request; if static, all values.
      asymmetric: with a zero point.
      static: one of `METHODS`, by which the range is chosen from calibration data; None: dynamic.
      threshold: magnitude from which on a value is an outlier, whose feature stays in floating point; 0: none is.
      fixed: the features of outliers are those of calibration data; else those of the window that is rounded.
      group_size: features of a group; 0 for other granularities.
      minifloat: values are of FP8 (e4m3), and not integers; `bits` is 8.
    """

    bits: int
    granularity: str
    asymmetric: bool = False
    static: str | None = None
    threshold: float = 0.0
    fixed: bool = False
    group_size: int = 0
    minifloat: bool = False

    def __str__(self) -> str:
        method = "" if self.static in (None, METHODS[0]) else f"_{self.static}"
        static = "" if self.static is None else f"_static{method}"
        outlier = f"_outlier{self.threshold:g}{'_static' if self.fixed else ''}" if self.threshold else ""
        shares = f"g{self.group_size}" if self.group_size else self.granularity
        return f"{self.number}_{shares}{static}{'_asym' if self.asymmetric else ''}{outlier}"

    @property
    def number(self) -> str:
        """The number format: `int8`, `fp8_e4m3`."""
        return FP8 if self.minifloat else f"int{self.bits}"

    @property
    def of_tokens(self) -> str:
        """The plainest scheme of its numbers, which all rows have."""
        return f"{self.number}_token"

    @property
    def kind(self) -> Kind:
        """The scheme without its bits."""
        more = self.threshold, self.fixed, self.group_size, self.minifloat
        return Kind(self.granularity, self.asymmetric, self.static is not None, *more)

    @property
    def is_calibrated(self) -> bool:
        """Whether it takes something from calibration data: a range, or the features of outliers."""
        return self.static is not None or self.fixed

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative, or 0 if asymmetric."""
        if self.minifloat:
            return FP8_TOP
        return 2**self.bits - 1 if self.asymmetric else 2 ** (self.bits - 1) - 1

    def size_bits(self, values: int, groups: int) -> int:
        """Bits of `values` codes with `groups` scales and, if asymmetric, zero points."""
        return values * self.bits + groups * (_SCALE_BITS + (self.bits if self.asymmetric else 0))


def parse_activation_scheme(text: str) -> ActivationScheme:
    """The scheme that `text` names; `str()` of the result gives `text` back.

    Raises:
      MpqError: the text is not of the form NUMBER_GRANULARITY[_static[_METHOD]][_asym][_outlierX[_static]], or its
        parts do not go together.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise MpqError(
            f"unknown activation scheme {text!r}: allowed is int2 to int8 or {FP8} with _{', _'.join(GRANULARITIES)} "
            "or _gN for groups of N features, and _asym for a zero point: int8_token, int4_head_asym, int4_g32; "
            f"_static after tensor or head, and a method of {', '.join(METHODS)}: int8_tensor_static, "
            "int8_head_static_percentile; _outlier6 after token for features that reach 6 in floating point: "
            "int8_token_outlier6, and those of calibration: int8_token_outlier6_static"
        )
    static = None if match["static"] is None else match["method"] or METHODS[0]
    if static is not None and match["granularity"] not in ("tensor", "head"):
        raise MpqError(f"{text!r}: tokens to come are not known in advance; a static range is of a tensor or a head")
    if (minifloat := match["bits"] is None) and (match["asymmetric"] or static == "entropy"):
        what = "entropy counts equal steps; take mse" if static == "entropy" else "_asym goes with integers alone"
        raise MpqError(f"{text!r}: {FP8} has a sign and steps that grow with the value: {what}")
    if static == "entropy" and match["asymmetric"]:
        raise MpqError(f"{text!r}: entropy chooses a range symmetric about 0; leave out _asym, or take mse")
    if match["threshold"] and match["granularity"] != "token":
        raise MpqError(f"{text!r}: outliers are features, apart from scales of tokens; write int8_token_outlier6")
    ends = (match["asymmetric"] is not None, static, float(match["threshold"] or 0), match["fixed"] is not None)
    size = int(match["size"] or 0)
    return ActivationScheme(
        int(match["bits"] or 8), "group" if size else match["granularity"], *ends, group_size=size, minifloat=minifloat
    )


def scale_and_zero(low: jax.Array, high: jax.Array, asymmetric: bool, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of ranges `[low, high]`, 0 among them; the zero point of a symmetric range is 0."""
    span = high - low if asymmetric else jnp.maximum(high, -low)
    scale = round_scale(span / top, SCALE_DTYPE)
    return scale, jnp.round(-low / scale) if asymmetric else jnp.zeros_like(scale)


def fake_quantize(
    x: jax.Array,
    kind: Kind,
    top: Any,
    *,
    heads: int,
    real: jax.Array,
    limits: tuple[jax.Array, jax.Array] | None = None,
    columns: jax.Array | None = None,
) -> jax.Array:
    """`x` rounded and scaled back, by the formulas of the module's docstring.

    Args:
      x: `[batch, positions, width]`; the positions of a window are neighbours.
      kind: what shares a scale, and whether there is a zero point.
      top: the largest code, `ActivationScheme.top`; it may be traced, so that one program serves all bits.
      heads: parts of `width` for granularity `head`.
      real: `bool[windows, time]`, or `bool[windows]`; padding is not part of a tensor. Where the positions of a window
        are not its `time`, all positions of a window with anything real are.
      limits: of a static kind, lowest and highest value, `float32[parts]` each, a part a head or 1 for the tensor.
      columns: of a fixed kind, `bool[width]`, the features that stay.

    Returns:
      Of the shape and dtype of `x`.

    Raises:
      MpqError: the positions cannot be divided among the windows, whose tensors or outliers are wanted.
    """
    codes, scale = quantize(x, kind, top, heads=heads, real=real, limits=limits, columns=columns)
    rounded = codes * scale
    if kind.group_size:  # of which the last may be filled up
        rounded = rounded.reshape(*x.shape[:2], -1)[..., : x.shape[2]]
    rounded = rounded.reshape(x.shape).astype(x.dtype)
    return jnp.where(outliers(x, kind, real=real, columns=columns), x, rounded) if kind.threshold else rounded


def quantize(
    x: jax.Array,
    kind: Kind,
    top: Any,
    *,
    heads: int,
    real: jax.Array,
    limits: tuple[jax.Array, jax.Array] | None = None,
    columns: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Codes less their zero point, numbers of the format in float32, and scales: arguments are as of `fake_quantize`.

    Returns:
      `float32[batch, rows, parts, values]` and scales that broadcast to it: the values of `x` in their order, divided
      into what shares a scale; the last group of a position is filled up with zeros. Codes of outliers are 0.
    """
    batch, positions, width = x.shape
    windows = len(real)
    values = x.astype(jnp.float32)
    if kind.threshold:
        values = jnp.where(outliers(x, kind, real=real, columns=columns), 0.0, values)
    if kind.group_size:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, -width % kind.group_size)))
    inside = values
    dynamic_tensor = kind.granularity == "tensor" and not kind.static
    if dynamic_tensor:
        if positions % windows:
            raise MpqError(f"{positions} positions are not those of {windows} windows: use a scale for every token")
        inside = jnp.where(_counted(real, positions), values, 0.0)
    groups = {
        "token": (batch, positions, 1, width),
        "group": (batch, positions, -1, kind.group_size),
        "head": (batch, positions, heads, width // max(heads, 1)),
        "tensor": (batch, windows, 1, positions // windows * width) if dynamic_tensor else (batch, positions, 1, width),
    }[kind.granularity]
    if kind.static:
        assert limits is not None  # whoever makes a static kind has its range
        low, high = (jnp.reshape(limit, (1, 1, -1, 1)) for limit in limits)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    else:
        low = inside.reshape(groups).min(axis=-1, keepdims=True, initial=0.0)
        high = inside.reshape(groups).max(axis=-1, keepdims=True, initial=0.0)
    top = jnp.asarray(top, jnp.float32)
    scale, zero = scale_and_zero(low, high, kind.asymmetric, top)
    if kind.minifloat:
        return nearest_fp8(jnp.clip(values.reshape(groups) / scale, -top, top)), scale
    least = 0.0 if kind.asymmetric else -top
    return jnp.clip(jnp.round(values.reshape(groups) / scale) + zero, least, top) - zero, scale


def nearest_fp8(x: jax.Array) -> jax.Array:
    """`float32`: the nearest number of e4m3, ties to even, of magnitudes up to `FP8_TOP`."""
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)


def outliers(x: jax.Array, kind: Kind, *, real: jax.Array, columns: jax.Array | None = None) -> jax.Array:
    """Which values belong to features with outliers, of a kind with a threshold; arguments as of `fake_quantize`.

    Returns:
      `bool` of the shape of `x`.

    Raises:
      MpqError: the positions cannot be divided among the windows.
    """
    if kind.fixed:
        assert columns is not None  # whoever makes a fixed kind has them
        return jnp.broadcast_to(columns, x.shape)
    batch, positions, width = x.shape
    if positions % len(real):
        raise MpqError(
            f"{positions} positions are not those of {len(real)} windows, whose outliers are wanted: use a scheme "
            "without them, or with those of calibration, int8_token_outlier6_static"
        )
    large = (jnp.abs(x) >= kind.threshold) & _counted(real, positions)
    found = large.reshape(batch, len(real), -1, width).any(axis=2, keepdims=True)
    return jnp.broadcast_to(found, (batch, len(real), positions // len(real), width)).reshape(x.shape)


def _counted(real: jax.Array, positions: int) -> jax.Array:
    """`bool[positions, 1]`: which positions are no padding, as far as `real` tells."""
    windows = len(real)
    rows = real if real.ndim == 2 and real.size == positions else real.reshape(windows, -1).any(axis=1)[:, None]
    return jnp.broadcast_to(rows, (windows, positions // windows)).reshape(-1, 1)
