"""SignRound: rounding and scales of a layer learned together, by the signs of their gradients.

Cheng et al. 2023, arXiv:2309.05516. A weight w of a group with scale s and zero point z gets the code

    q = clip(round(w / s + z + v)),   -1/2 <= v <= 1/2,

and v is learned together with factors of the group's range (their eqs. 3-5), by signed gradient descent, to leave the
smallest error of the layer's output. Derivatives go straight through every rounding (Bengio et al. 2013,
arXiv:1308.3432). The step decays linearly to zero from 1 / steps, so that v can just reach both neighbouring codes.

Differences from the paper:
- The loss is that of one matrix, tr(eT H e) for the error e = w - quantized and the gram H: all of the calibration data
  at once instead of batches, and one weight instead of a block. So it is deterministic and needs no data but the gram.
  What it cannot see is how the weights of a block make up for each other's errors, and errors of their inputs.
- It starts from GPTQ's codes and scales, not from rounding to nearest under absmax ones, and factors may reach from 1/2
  to 3/2 of that range. Where GPTQ chose another code than the nearest, v counts from the middle of that code's step.
- Output columns are independent. Each keeps the best of all its steps, the start among them; so the layer loss is never
  above that of GPTQ, nor of RTN, by construction.
- For formats with uneven levels v counts in the mean distance of the nearest level to its neighbours.
- What all groups of a matrix share (a tensor scale, learned levels, or the one scale of a scheme per tensor) is that of
  the start, and so is all of a block of ggml with integers of groups or a minimum.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpq.quantize import scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.loss import better, dot
from mpq.quantize.rtn import RTN
from mpq.quantize.tiles import by_columns
from mpq.quantize.widths import common, with_width
from mpq.types import MpqError, QTensor, Scheme

_LEAST, _MOST = 0.5, 1.5  # of the factors of a range
_GPTQ = GPTQ()


@dataclasses.dataclass(frozen=True)
class SignRound:
    """Rounding offsets and ranges learned by signed gradient descent on the layer loss.

    Float formats are cast. Without a gram (a weight that is only looked up, never multiplied) it is its start.

    Attributes:
      steps: of the descent.
      ranges: whether ranges are learned too, or only the rounding.
      start: where the descent begins.
      columns: output columns computed at once, as in `GPTQ`.
    """

    steps: int = 200
    ranges: bool = True
    start: RTN | GPTQ = _GPTQ
    columns: int = 256

    def __post_init__(self) -> None:
        if self.steps < 1 or self.columns < 1:
            raise MpqError(f"steps {self.steps} and columns {self.columns} must be at least 1, such as 200 and 256")

    @property
    def name(self) -> str:
        """`signround`."""
        return "signround"

    @property
    def scale(self) -> str:
        """How the start chooses its scales."""
        return self.start.scale

    @property
    def data_aware(self) -> bool:
        """Always."""
        return True

    def __call__(self, w: jax.Array, scheme: Scheme, gram: jax.Array | None = None) -> QTensor:
        """Quantize `w` so that `x @ w` changes little.

        Args:
          w: `float32[batch, k, n]`, finite.
          scheme: any scheme.
          gram: `float32[batch, k, k]`, E[x xT], finite and positive semidefinite; or None.
        """
        start = self.start(w, scheme, gram)
        if gram is None or not scales.can_move(scheme):
            return start
        form, width = common(scheme)
        learn = lambda w, start: _learn(w, start, gram, width, self.steps, self.ranges)
        learned = by_columns(learn, w, dataclasses.replace(start, scheme=form), self.columns)
        return dataclasses.replace(learned, scheme=scheme)


class _Learned(NamedTuple):
    """What is learned.

    Attributes:
      offset: `float32[batch, groups, rows, n]`, v.
      ends: `float32[batch, ends, groups, n]`: factors of the scale, or of both ends of an affine range.
    """

    offset: jax.Array
    ends: jax.Array


class _Start(NamedTuple):
    """Where the descent begins, in groups.

    Attributes:
      x: `float32[batch, groups, rows, n]`, the weight.
      fixed: of that shape: what takes a weight to the middle of the step of its code, where that is not the nearest.
      gap: what v counts in; broadcasts against them.
      scale: `float32[batch, groups, n]`, as stored, or one of the matrix.
      zero_point: the code of zero, `float32` of that shape.
      unit: what the scales are factors of.
    """

    x: jax.Array
    fixed: jax.Array
    gap: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    unit: jax.Array


class _Codes(NamedTuple):
    """What was learned makes of a weight; derivatives go through its roundings.

    Attributes:
      level: `float32[batch, groups, rows, n]`, what the codes decode to.
      scale, zero_point: as in `_Start`.
    """

    level: jax.Array
    scale: jax.Array
    zero_point: jax.Array


@functools.partial(jax.jit, static_argnames=("steps", "ranges"))
def _learn(w: jax.Array, start: QTensor, gram: jax.Array, width: jax.Array | None, steps: int, ranges: bool) -> QTensor:
    """The best of all steps from `start` for every output column of `w[batch, k, n]`."""
    scheme = with_width(start.scheme, width).with_levels(start.codebook)
    begin = _begin(w, start, scheme)
    ranges = ranges and not scheme.per_tensor

    def error(learned: _Learned) -> jax.Array:
        """`float32[batch, k, n]`."""
        codes = _codes(begin, learned, scheme, ranges)
        value = (codes.level - codes.zero_point[..., None, :]) * (codes.scale * begin.unit)[..., None, :]
        return (begin.x - value).reshape(len(w), -1, w.shape[-1])[:, : w.shape[-2]]

    def one_step(index: jax.Array, state: tuple[_Learned, _Learned, jax.Array]) -> tuple[_Learned, _Learned, jax.Array]:
        learned, best, least = state
        difference, back = jax.vjp(error, learned)
        pull = dot(gram, difference)
        (slope,) = back(-pull)  # of half the loss, with the sign turned: the way down
        loss = jnp.sum(difference * pull, axis=-2)
        lower = loss < least
        best = jax.tree.map(lambda new, old: jnp.where(lower[:, None, None], new, old), learned, best)
        rate = (1 - index.astype(jnp.float32) / steps) / steps
        offset, ends = jax.tree.map(lambda a, b: a + rate * jnp.sign(b), learned, slope)
        moved = _Learned(jnp.clip(offset, -0.5, 0.5), jnp.clip(ends, _LEAST, _MOST))
        return moved, best, jnp.where(lower, loss, least)

    ends = jnp.ones((len(w), 1 + scheme.zero_point, begin.x.shape[1], w.shape[-1]))
    first, least = _Learned(jnp.zeros_like(begin.x), ends), jnp.full((len(w), w.shape[-1]), jnp.inf)
    best = jax.lax.fori_loop(0, steps, one_step, (first, first, least))[1]
    return better(_stored(_codes(begin, best, scheme, ranges), start, scheme), start, w, gram)


def _begin(w: jax.Array, start: QTensor, scheme: Scheme) -> _Start:
    """`start` in groups; `scheme` is its scheme with the width."""
    assert start.scale is not None
    x, qvalue = scales.grouped(w, scheme), scales.grouped(start.qvalue, scheme)
    unit = jnp.float32(1) if start.tensor_scale is None else start.tensor_scale
    scale, decode = start.scale.astype(jnp.float32), scheme.format.decode
    zero_point = jnp.zeros_like(scale) if start.zero_point is None else decode(start.zero_point)
    value = x / (scale * unit)[..., None, :] + zero_point[..., None, :]
    fixed = jnp.where(scheme.format.encode(value) == qvalue, 0.0, decode(qvalue) - value)
    return _Start(x, fixed, _gap(qvalue, scheme), scale, zero_point, unit)


def _codes(begin: _Start, learned: _Learned, scheme: Scheme, ranges: bool) -> _Codes:
    """What was learned, as codes; `ranges`: whether scales and zero points too."""
    scale, zero_point, grid = begin.scale, begin.zero_point, scheme.format
    if ranges:
        scale, zero_point = _ranges(scale, zero_point, learned.ends, scheme)
    value = begin.x / (scale * begin.unit)[..., None, :] + zero_point[..., None, :]
    value = value + begin.fixed + learned.offset * begin.gap
    return _Codes(_through(jnp.clip(value, *_reach(scheme)), grid.decode(grid.encode(value))), scale, zero_point)


def _ranges(scale: jax.Array, zero_point: jax.Array, ends: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of ranges whose ends are multiplied by `ends[batch, ends, groups, n]`."""
    if not scheme.zero_point:
        exact = scale * ends[:, 0]
        return _through(exact, scales.round_scale(exact, scheme.scale_dtype)), zero_point
    lowest, highest = _span(scheme)
    low, high = (lowest - zero_point) * ends[:, 0], (highest - zero_point) * ends[:, 1]  # in steps of the start
    exact = scale * (high - low) / (highest - lowest)
    moved = jnp.clip(lowest - low * (highest - lowest) / (high - low), lowest, highest)
    return _through(exact, scales.round_scale(exact, scheme.scale_dtype)), _through(moved, jnp.round(moved))


def _stored(codes: _Codes, start: QTensor, scheme: Scheme) -> QTensor:
    """In the arrays of a quantized weight; `scheme` is that of `start` with the width."""
    encode = scheme.format.encode
    assert start.scale is not None
    qvalue = encode(codes.level).reshape(len(codes.level), -1, codes.level.shape[-1])[:, : start.qvalue.shape[-2]]
    zero_point = None if start.zero_point is None else encode(codes.zero_point)
    return dataclasses.replace(start, qvalue=qvalue, scale=codes.scale.astype(start.scale.dtype), zero_point=zero_point)


def _through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """The value of `rounded`, to the bit, with the derivative of `exact`."""
    return (exact - jax.lax.stop_gradient(exact)) + jax.lax.stop_gradient(rounded)


def _span(scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest level; of integers these are codes."""
    grid = scheme.format
    if grid.uniform:
        return jnp.asarray(grid.min_qvalue, jnp.float32), jnp.asarray(grid.max_qvalue, jnp.float32)
    return _level(scheme, grid.min_qvalue), _level(scheme, grid.max_qvalue)


def _level(scheme: Scheme, code: int) -> jax.Array:
    """What a code decodes to, in groups of every matrix: `float32[1 or batch, 1, 1, 1]`."""
    return scheme.format.decode(jnp.full((1, 1, 1, 1), code, jnp.int8))


def _reach(scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Where codes end: half a step beyond the outermost levels. Derivatives pass between."""
    grid, (lowest, highest) = scheme.format, _span(scheme)
    if grid.uniform:
        return lowest - 0.5, highest + 0.5
    second, last_but_one = _level(scheme, grid.min_qvalue + 1), _level(scheme, grid.max_qvalue - 1)
    return lowest - (second - lowest) / 2, highest + (highest - last_but_one) / 2


def _gap(qvalue: jax.Array, scheme: Scheme) -> jax.Array:
    """Mean distance of the level of each code to those beside it; 1 for integers."""
    grid = scheme.format
    if grid.uniform:
        return jnp.ones(())
    below, above = jnp.maximum(qvalue - 1, grid.min_qvalue), jnp.minimum(qvalue + 1, grid.max_qvalue)
    return (grid.decode(above) - grid.decode(below)) / (above - below).astype(jnp.float32)
