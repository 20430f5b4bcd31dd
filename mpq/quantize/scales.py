"""Scales and zero points: one of each for every group of a column of `w[k, n]`, or for the whole matrix.

Two methods. `absmax` puts the largest magnitude of a group on the largest level: what the field calls RTN. `mse`
searches the scale (affine: both ends of the range) for the smallest squared error of the group, optionally weighted by
row. Codes along a trellis take the root of the weighted mean square of the group in either.

Every candidate is rounded to the scheme's scale dtype *before* its error is scored, so the search sees what is stored.
Groups are padded with zero rows of zero weight, which every format represents exactly: padding influences nothing.

Scales of 8 bits come in two kinds. Those in e4m3 are factors of one float32 of the matrix, chosen so that the largest
scale of any group is 448, the largest e4m3, as in NVFP4 (NVIDIA 2025, arXiv:2509.25149). Powers of two (e8m0) follow
the rule of the OCP Microscaling Formats (Rouhani et al. 2023, arXiv:2310.10537, Alg. 1): 2^(floor(log2 absmax) - emax),
2^emax being the largest power of two that the format reaches. What lies between its largest level and 2^(emax + 1)
saturates. Formats whose largest level is a power of two (int2, nf3, nf4), which that rule was not made for, would lose
up to half of the largest values: for them the logarithm is rounded up. `mse` also tries one power more and one less.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq.grids import encode_scaled
from mpq.quantize import block_scales, codebooks
from mpq.quantize.rounding import round_scale
from mpq.types import MpqError, QTensor, Scheme

METHODS = ("absmax", "mse")

# `mse` tries these many fractions of the absmax scale, from bits / 10 (long tails, few levels: clip most) to 1.05, for
# each sign; for affine schemes these many for each end of the range. Finer grids were measured to lower the error by
# less than 1 %.
_NUM_FACTORS, _NUM_ENDS, _LARGEST = 20, 7, 1.05
_MOST_BITS = 8  # of any format with a scale
# Elements that candidates scored at once may take together.
_CHUNK = 2**19
# Share of the mean added to every row's weight, so that rows that calibration never excited still count a little.
_FLOOR = 0.01


_POWERS = (1.0, 2.0, 0.5)  # factors that `mse` tries on a scale that is a power of two
_POWER_OF_TWO = "float8_e8m0fnu"


class Shared(NamedTuple):
    """What all groups of a matrix have in common, fixed before any group is fitted; None: each group has its own.

    Attributes:
      tensor_scale: `float32[..., 1, 1]`, if scales are factors of it.
      scale, zero_point: `float32[..., 1, 1]` and `int8[..., 1, 1]`, if the matrix is one group.
      codebook: `float16[..., levels, 1]`, if levels are learned.
    """

    tensor_scale: jax.Array | None = None
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None

    def restore(self, qtensor: QTensor) -> QTensor:
        """`qtensor` with these in their shapes, after its arrays were computed by column and joined."""
        if self.scale is not None:
            scale = self.scale.astype(qtensor.scheme.scale_dtype)
            qtensor = dataclasses.replace(qtensor, scale=scale, zero_point=self.zero_point)
        return dataclasses.replace(qtensor, tensor_scale=self.tensor_scale, codebook=self.codebook)


def check_method(method: str) -> None:
    """Refuse an unknown way to choose scales.

    Raises:
      MpqError: `method` is not one of `METHODS`.
    """
    if method not in METHODS:
        raise MpqError(f"unknown scale method {method!r}: allowed is {' or '.join(METHODS)}")


def can_move(scheme: Scheme) -> bool:
    """Whether codes may be learned one by one under scales of groups.

    Not where there are none, where blocks fit scales of their own, or where the codes behind one would change with it.
    """
    return scheme.has_scale and not block_scales.applies(scheme) and scheme.format.span == 1


def row_weight(diagonal: jax.Array) -> jax.Array:
    """Weight of each row's squared error: the gram's diagonal `[..., k]` plus 1 % of its mean; 1 where all is zero.

    On correlated inputs this lowers the layer loss of RTN and GPTQ by a sixth to a quarter against equal weights.
    """
    mean = diagonal.mean(axis=-1, keepdims=True)
    return jnp.where(mean > 0, diagonal + _FLOOR * mean, 1.0)


def fit_matrix(w: jax.Array, scheme: Scheme, method: str, weight: jax.Array) -> Shared:
    """What the scheme lets all groups of `w` share.

    A tensor scale keeps 12 significant bits, so that its products with scales and codes are exact in float32, and a
    matrix that is quantized again keeps its codes.

    Args:
      w: `float32[..., k, n]`.
      scheme: any scheme.
      method: one of `METHODS`.
      weight: `float32[..., k]`, weight of each row's squared error; read by `mse` only.
    """
    tensor_scale = _tensor_scale(w, scheme) if scheme.has_tensor_scale else None
    codebook = None
    if scheme.has_codebook:
        fit = functools.partial(_fit_codebook, scheme=scheme, method=method)
        codebook = (jax.vmap(fit) if w.ndim > 2 else fit)(w, weight, tensor_scale)
    if not scheme.per_tensor:
        return Shared(tensor_scale, codebook=codebook)
    column = w.reshape(*w.shape[:-2], 1, -1, 1)  # one group of one column
    row = jnp.broadcast_to(weight[..., None], w.shape).reshape(column.shape)
    return Shared(None, *fit_group(column, scheme.with_levels(codebook), method, row), codebook)


def _tensor_scale(w: jax.Array, scheme: Scheme) -> jax.Array:
    """`float32[..., 1, 1]`: what scales in e4m3 are factors of."""
    low, high = (jnp.abs(end(w, axis=(-2, -1), keepdims=True, initial=0.0)) for end in (jnp.min, jnp.max))
    if scheme.zero_point:
        steps = jnp.float32(scheme.format.max_qvalue - scheme.format.min_qvalue)
        largest = high / steps + low / steps
    else:
        reach = 1.0 if scheme.format.span > 1 else scheme.format.max_magnitude  # no root mean square is above absmax
        largest = jnp.maximum(low, high) / jnp.float32(reach)
    scale = largest / np.float32(jnp.finfo(scheme.scale_dtype).max)
    # At least 2^-110: the product with the smallest e4m3, 2^-9, is a normal float32.
    scale = jnp.where(largest > 0, jnp.maximum(scale, np.float32(2.0**-110)), 1.0)
    return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=11)


def _fit_codebook(
    w: jax.Array, weight: jax.Array, tensor_scale: jax.Array | None, *, scheme: Scheme, method: str
) -> jax.Array:
    """`float16[levels, 1]` of `w[k, n]`."""
    if method == "absmax":
        weight = jnp.ones_like(weight)
    x, row = grouped(w, scheme), grouped(weight[:, None], scheme)
    unit = np.float32(1) if tensor_scale is None else tensor_scale

    def fit_scale(levels: jax.Array | None, method: str) -> jax.Array:
        groups = (jnp.broadcast_to(a, x.shape).reshape(1, -1, 1) for a in (x, row)) if scheme.per_tensor else (x, row)
        part, part_row = groups
        scale, _ = fit_group(part, scheme.with_levels(levels), method, part_row, tensor_scale)
        return (scale * unit)[:, None]

    return codebooks.fit(x, row, scheme, fit_scale, search=method == "mse")


def fit_group(
    x: jax.Array, scheme: Scheme, method: str, weight: jax.Array, tensor_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of groups that are the whole second-last axis.

    Args:
      x: `float32[..., rows, n]`.
      scheme: a scheme with a scale; its group size is not read.
      method: one of `METHODS`.
      weight: `float32[..., rows, 1]`, weight of each row's squared error; read by `mse`, and of trellises.
      tensor_scale: `float32`, broadcasts against `[..., n]`: what the scales are factors of, or None.

    Returns:
      scale `float32[..., n]`, exactly representable in the scheme's scale dtype, and zero point `int8[..., n]` or
      None. A group of zeros has scale 1 and decodes to exact zeros, where the format has one.
    """
    unit = np.float32(1) if tensor_scale is None else tensor_scale
    if scheme.zero_point:
        low, high = jnp.minimum(x.min(axis=-2), 0.0), jnp.maximum(x.max(axis=-2), 0.0)
        propose = lambda ends: _affine(low * ends[..., 0], high * ends[..., 1], scheme, unit)
    else:
        coupled = scheme.format.span > 1
        base = (_mean_square(x, weight) if coupled else _symmetric(jnp.abs(x).max(axis=-2), scheme)) / unit
        if scheme.has_codebook:  # the largest magnitude takes the level -1
            base = jnp.where(x.max(axis=-2) > -x.min(axis=-2), -base, base)
        # These and IQ4_NL have no 0: the smallest scale brings it closest. A power of two is never 0.
        without = scheme.has_codebook or coupled
        without |= scheme.blocks is not None and scheme.scale_dtype != _POWER_OF_TWO
        empty = 0.0 if without else 1.0
        propose = lambda factor: (round_scale(jnp.where(base != 0, base * factor, empty), scheme.scale_dtype), None)
    searched = method == "mse" and scheme.format.span == 1
    candidates = _candidates(scheme) if searched else _candidates(scheme)[:1]
    if len(candidates) == 1:
        return propose(candidates[0])

    def error(candidate: jax.Array) -> jax.Array:
        scale, zero_point = propose(candidate)
        scale = scale * unit
        difference = decode(encode(x, scale, zero_point, scheme), scale, zero_point, scheme) - x
        return jnp.sum(weight * difference**2, axis=-2)

    chunk = max(1, min(len(candidates), _CHUNK // max(x.size, 1)))
    candidates = jnp.concatenate([candidates, candidates[: -len(candidates) % chunk]])
    errors = jax.lax.map(error, candidates, batch_size=chunk)
    return propose(candidates[errors.argmin(axis=0)])


def _candidates(scheme: Scheme) -> jax.Array:
    """Factors of the absmax scale `[candidates]`, or of both ends of the range `[candidates, 2]`; absmax first."""
    if scheme.scale_dtype == _POWER_OF_TWO:
        return jnp.array(_POWERS, jnp.float32)
    mirrored = scheme.format.uniform or scheme.has_codebook or scheme.blocks is not None
    # By width, in a table: the width may be known only when the compiled function runs.
    make = _ends if scheme.zero_point else functools.partial(_factors, mirrored=mirrored)
    return jnp.asarray(np.stack([make(bits / 10) for bits in range(_MOST_BITS + 1)]))[scheme.format.bits]


def _ends(smallest: float) -> np.ndarray:
    """`float32[candidates, 2]`."""
    ends = np.linspace(smallest, _LARGEST, _NUM_ENDS, dtype=np.float32)
    return np.concatenate([[[1, 1]], np.stack(np.meshgrid(ends, ends), axis=-1).reshape(-1, 2)]).astype(np.float32)


def _factors(smallest: float, mirrored: bool) -> np.ndarray:
    """`float32[candidates]`.

    Integers reach one step further below than above (two's complement): a negative scale makes a different grid of
    them, and is tried too. Other formats are the same on both sides, or have no such freedom, except IQ4_NL and learned
    levels, which reach further below too.
    """
    factors = np.linspace(smallest, _LARGEST, _NUM_FACTORS, dtype=np.float32)
    return np.concatenate([[np.float32(1)], factors, *([-factors] if mirrored else [])])


def _symmetric(absmax: jax.Array, scheme: Scheme) -> jax.Array:
    """Scale of groups with these largest magnitudes, before it is rounded."""
    largest = scheme.format.max_magnitude
    assert largest is not None
    if scheme.scale_dtype != _POWER_OF_TWO:
        return absmax / jnp.float32(largest)
    mantissa, exponent = math.frexp(largest)
    up = 2**23 - 1 if mantissa == 0.5 else 0  # added to the bits, it carries into the exponent of all but powers of two
    power = (jax.lax.bitcast_convert_type(absmax, jnp.int32) + up) & 0x7F800000  # the exponent alone
    return jax.lax.bitcast_convert_type(power, jnp.float32) * np.float32(2.0 ** (1 - exponent))


def _mean_square(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Root of the weighted mean square of groups `[..., rows, n]`: the scale of a trellis."""
    largest = jnp.abs(x).max(axis=-2, keepdims=True)  # taken out: squares of tiny and of huge numbers are not floats
    unit = x / jnp.where(largest > 0, largest, 1.0)
    return largest[..., 0, :] * jnp.sqrt(jnp.sum(weight * unit**2, axis=-2) / jnp.sum(weight, axis=-2))


def _affine(
    low: jax.Array, high: jax.Array, scheme: Scheme, unit: jax.Array | np.float32
) -> tuple[jax.Array, jax.Array]:
    """Scale, in units of `unit`, and zero point of the range `low <= 0 <= high`."""
    lowest, highest = scheme.format.min_qvalue, scheme.format.max_qvalue
    steps = jnp.float32(highest - lowest)
    scale = high / steps - low / steps  # divided first: the difference of two finite ends can overflow
    scale = round_scale(jnp.where(scale > 0, scale / unit, 1.0), scheme.scale_dtype)
    zero_point = jnp.round(jnp.float32(lowest) - low / (scale * unit))
    zero_point = jnp.clip(zero_point, jnp.float32(lowest), jnp.float32(highest))
    return scale, zero_point.astype(jnp.int8)


def encode(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Codes of `x[..., rows, n]` under `scale[..., n]`."""
    y = x / scale[..., None, :]
    if zero_point is not None:
        y = y + scheme.format.decode(zero_point)[..., None, :]
    return encode_scaled(scheme.format, y, scale[..., None, :])


def decode(qvalue: jax.Array, scale: jax.Array, zero_point: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Inverse of `encode`."""
    y = scheme.format.decode(qvalue)
    if zero_point is not None:
        y = y - scheme.format.decode(zero_point)[..., None, :]
    return y * scale[..., None, :]


def quantize(w: jax.Array, scheme: Scheme, method: str, weight: jax.Array, shared: Shared | None = None) -> QTensor:
    """`w` rounded to nearest under scales chosen by `method`.

    Args:
      w: `float32[..., k, n]`.
      scheme: any scheme.
      method: one of `METHODS`.
      weight: `float32[..., k]`, weight of each row's squared error; read by `mse` only.
      shared: `fit_matrix` of the matrix that `w` is a part of; None: `w` is the whole.
    """
    if not scheme.has_scale:
        return QTensor(scheme.format.encode(w), None, None, scheme)
    if block_scales.applies(scheme):
        return block_scales.quantize(w, scheme, method, weight)
    shared = fit_matrix(w, scheme, method, weight) if shared is None else shared
    x, row = grouped(w, scheme), grouped(weight[..., None], scheme)
    scale, zero_point = shared.scale, shared.zero_point
    if scale is None:
        scale, zero_point = fit_group(x, scheme.with_levels(shared.codebook), method, row, shared.tensor_scale)
    return rounded(x, w.shape[-2], scale, zero_point, scheme, shared)


def grouped(a: jax.Array, scheme: Scheme) -> jax.Array:
    """`a[..., k, n]` as `[..., groups, rows, n]`; zeros fill up the last group."""
    k = a.shape[-2]
    groups, rows = scheme.num_groups(k), min(scheme.group_size or k, k)
    padded = jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, groups * rows - k), (0, 0)])
    return padded.reshape(*a.shape[:-2], groups, rows, a.shape[-1])


def rounded(
    x: jax.Array,
    k: int,
    scale: jax.Array,
    zero_point: jax.Array | None,
    scheme: Scheme,
    shared: Shared,
) -> QTensor:
    """Groups rounded to nearest under given scales.

    Args:
      x: `float32[..., groups, rows, n]`, what `grouped` made of a weight.
      k: rows of that weight.
      scale: `float32`, `[..., groups, n]` or one of the matrix, exactly representable in the scheme's scale dtype.
      zero_point: `int8` of that shape, or None.
      scheme: a scheme with a scale.
      shared: what scales are factors of, and the levels if they are learned.
    """
    effective = scale if shared.tensor_scale is None else scale * shared.tensor_scale
    qvalue = encode(x, effective, zero_point, scheme.with_levels(shared.codebook))
    qvalue = qvalue.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :k, :]
    scale = scale.astype(scheme.scale_dtype)
    return QTensor(qvalue, scale, zero_point, scheme, shared.tensor_scale, codebook=shared.codebook)
