"""Scales and minima of ggml's blocks, whose groups have integers under one float16 of the block.

In three steps. First every group is fitted for itself, in float: for each of a few step sizes its rows are rounded, and
the scale (and minimum) that serve those codes best follow in closed form by weighted least squares. Second, the block's
float16 is set so that its largest group has the largest integer, and all others are rounded to it. Third, each group
tries its integers and their neighbours with the rows rounded anew under exactly what would be stored, and keeps the
best. Errors are squared and weighted by row.

`absmax` puts a group's largest magnitude, or both ends of its range, on the ends of the grid, and only rounds.

The first step searches what `make_qx_quants` and `make_qkx3_quants` of llama.cpp search; these keep the first rounding
of the integers, with which the third step differs. A group may get scale 0; its codes are then those of 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq.formats.ggml import sub_range
from mpq.grids import Blocks
from mpq.quantize.rounding import round_scale
from mpq.types import QTensor, Scheme

_STEPS = 15  # step sizes tried for each group, that of its whole range among them
_TINY = np.float32(1e-30)


class BlockFit(NamedTuple):
    """What blocks store beside codes, as float32 that the stored types hold exactly; None where the scheme has none.

    Attributes:
      scale, minimum: `[..., n]`, one for every block.
      sub_scale, sub_minimum: `[..., groups, n]`.
    """

    scale: jax.Array
    minimum: jax.Array | None
    sub_scale: jax.Array | None
    sub_minimum: jax.Array | None

    @property
    def step(self) -> jax.Array:
        """`[..., groups, n]`: what a step of the grid is worth."""
        scale = self.scale[..., None, :]
        return scale if self.sub_scale is None else scale * self.sub_scale

    @property
    def offset(self) -> jax.Array | None:
        """`[..., groups, n]`: what is added to every value."""
        if self.minimum is None:
            return None
        minimum = self.minimum[..., None, :]
        return minimum if self.sub_minimum is None else -minimum * self.sub_minimum


def applies(scheme: Scheme) -> bool:
    """Whether a scheme's scales are fitted here: blocks with one scale and no more are groups as any others."""
    return scheme.blocks is not None and (scheme.blocks.minimum or scheme.blocks.sub_bits is not None)


def quantize(w: jax.Array, scheme: Scheme, method: str, weight: jax.Array) -> QTensor:
    """`w` rounded to nearest under scales chosen by `method`.

    Args:
      w: `float32[..., k, n]`; blocks fill `k`.
      scheme: one that this module applies to.
      method: one of `scales.METHODS`.
      weight: `float32[..., k]`, weight of each row's squared error; read by `mse` only.
    """
    x, row = in_groups(w, scheme), in_groups(weight[..., None], scheme)
    fit = fit_blocks(x, scheme, method, row)
    step, offset = jax.tree.map(lambda a: a[..., None, :], (fit.step, fit.offset))
    return store(encode(x, step, offset, scheme).reshape(w.shape), fit, scheme)


def in_groups(a: jax.Array, scheme: Scheme) -> jax.Array:
    """`[..., k, n]` as `[..., blocks, groups, rows, n]`."""
    assert scheme.blocks is not None
    size = scheme.group_size or scheme.blocks.rows
    return a.reshape(*a.shape[:-2], -1, scheme.blocks.rows // size, size, a.shape[-1])


def store(qvalue: jax.Array, fit: BlockFit, scheme: Scheme) -> QTensor:
    """The quantized weight of these codes `[..., k, n]` and the fit of all its blocks `[..., blocks, (groups,) n]`."""
    flat = lambda a: None if a is None else a.astype(jnp.int8).reshape(*a.shape[:-3], -1, a.shape[-1])
    minimum = None if fit.minimum is None else fit.minimum.astype(jnp.float16)
    return QTensor(
        qvalue,
        fit.scale.astype(scheme.scale_dtype),
        None,
        scheme,
        sub_scale=flat(fit.sub_scale),
        minimum=minimum,
        sub_minimum=flat(fit.sub_minimum),
    )


def encode(x: jax.Array, step: jax.Array, offset: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Codes of `x` under a step and an offset that broadcast against it; those of 0 where the step is 0."""
    inverse = jnp.where(step != 0, 1 / jnp.where(step != 0, step, 1), 0)
    return scheme.format.encode((x if offset is None else x - offset) * inverse)


def decode(qvalue: jax.Array, step: jax.Array, offset: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Inverse of `encode`."""
    value = scheme.format.decode(qvalue) * step
    return value if offset is None else value + offset


def fit_blocks(x: jax.Array, scheme: Scheme, method: str, weight: jax.Array) -> BlockFit:
    """Scales and minima of blocks that are the axes `groups, rows`.

    Args:
      x: `float32[..., groups, rows, n]`.
      scheme: of ggml, with integers of groups or a minimum.
      method: one of `scales.METHODS`.
      weight: `float32[..., groups, rows, 1]`, weight of each row's squared error; read by `mse` only.
    """
    blocks = scheme.blocks
    assert blocks is not None
    search = method == "mse"
    if blocks.minimum:
        step, offset = _affine(x, scheme, weight, search)
    else:
        step, offset = _symmetric(x, scheme, weight, search), None
    if blocks.sub_bits is None:
        assert offset is not None
        half = jnp.float32(jnp.finfo(jnp.float16).max)
        minimum = jnp.clip(offset[..., 0, :], -half, half).astype(jnp.float16).astype(jnp.float32)
        return BlockFit(round_scale(step[..., 0, :], "float16"), minimum, None, None)
    scale, sub_scale = _integers(step, blocks)
    minimum, sub_minimum = (None, None) if offset is None else _integers(-offset, blocks)
    fit = BlockFit(scale, minimum, sub_scale, sub_minimum)
    return _neighbours(x, fit, scheme, weight) if search else fit


def _symmetric(x: jax.Array, scheme: Scheme, weight: jax.Array, search: bool) -> jax.Array:
    """`float32[..., groups, n]`: scale of each group, of either sign."""
    absmax, highest = jnp.abs(x).max(axis=-2), jnp.float32(scheme.format.max_magnitude or 1)
    if not search:
        return absmax / highest
    # The lowest level reaches further than the highest: the sign decides which side of the weights it serves.
    lowest = -scheme.format.decode(jnp.int8(scheme.format.min_qvalue))
    smallest = 0.7 if scheme.format.bits <= 3 else 0.85
    reach = jnp.asarray([1.0, *np.linspace(smallest, 1.1, _STEPS // 2)], jnp.float32) * lowest
    energy = sum_rows(weight * x * x)

    def attempt(best: tuple[jax.Array, jax.Array], reach: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        value = scheme.format.decode(encode(x, (absmax / reach)[..., None, :], None, scheme))
        cross, square = sum_rows(weight * value * x), sum_rows(weight * value * value)
        step = cross / jnp.maximum(square, _TINY)
        return _better(best, (step, energy - cross * step)), None

    start = absmax / highest, jnp.full_like(absmax, jnp.inf)
    (step, _), _ = jax.lax.scan(attempt, start, jnp.concatenate([reach, -reach]))
    return step


def _affine(x: jax.Array, scheme: Scheme, weight: jax.Array, search: bool) -> tuple[jax.Array, jax.Array]:
    """`float32[..., groups, n]` each: scale, not negative, and offset of each group; with sub-scales at most 0."""
    blocks = scheme.blocks
    assert blocks is not None
    low, high = x.min(axis=-2), x.max(axis=-2)
    if blocks.sub_bits is not None:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    steps = jnp.float32(scheme.format.max_qvalue)
    first = (high - low) / steps
    if not search:
        return first, low
    widest = jnp.float32(1.0 if scheme.format.bits > 2 else 0.8)
    tried = steps + jnp.linspace(-widest, widest, _STEPS, dtype=jnp.float32)
    sums = lambda value: sum_rows(weight * value)
    total, linear, energy = sums(jnp.ones_like(x)), sums(x), sums(x * x)

    def attempt(
        best: tuple[jax.Array, jax.Array, jax.Array], steps: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        span = ((high - low) / steps)[..., None, :]
        value = scheme.format.decode(encode(x, span, low[..., None, :], scheme))
        one, two, cross = sums(value), sums(value * value), sums(value * x)
        determinant = total * two - one * one
        free = determinant > 1e-6 * total * two
        below = jnp.where(free, determinant, 1.0)
        step = jnp.where(free, (total * cross - linear * one) / below, span[..., 0, :])
        offset = jnp.where(free, (two * linear - one * cross) / below, low)
        if blocks.sub_bits is not None:  # a minimum is never negative: without one, the best scale is another
            alone = cross / jnp.maximum(two, _TINY)
            step, offset = jnp.where(offset > 0, alone, step), jnp.minimum(offset, 0.0)
        step = jnp.maximum(step, 0.0)
        error = energy + step * (step * two - 2 * cross) + offset * (offset * total - 2 * linear + 2 * step * one)
        return _better(best, (step, offset, error)), None

    (step, offset, _), _ = jax.lax.scan(attempt, (first, low, jnp.full_like(low, jnp.inf)), tried)
    return step, offset


def sum_rows(a: jax.Array) -> jax.Array:
    """`[..., rows, n]` summed over its rows, `[..., n]`: halves are added to each other until one row is left.

    XLA adds rows up one column after another, a few numbers at a time. Elementwise sums of halves fill its vectors
    along `n`: the searches here are four to twelve times as fast. What cannot be halved is summed.
    """
    while a.shape[-2] % 2 == 0:
        half = a.shape[-2] // 2
        a = a[..., :half, :] + a[..., half:, :]
    return jnp.sum(a, axis=-2)


def _better(best: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple:
    """Of two tuples that end with an error, group by group the one with the smaller."""
    return tuple(jnp.where(new[-1] < best[-1], b, a) for a, b in zip(best, new, strict=True))


def _integers(step: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Float16 of the block `[..., n]` and integers of its groups `[..., groups, n]` whose products are nearest."""
    lowest, highest = sub_range(blocks)
    largest = jnp.take_along_axis(step, jnp.abs(step).argmax(axis=-2, keepdims=True), axis=-2)[..., 0, :]
    scale = round_scale(largest / jnp.float32(lowest or highest), "float16")
    integer = jnp.round(step / scale[..., None, :])
    return scale, jnp.clip(integer, jnp.float32(lowest), jnp.float32(highest))


def _neighbours(x: jax.Array, fit: BlockFit, scheme: Scheme, weight: jax.Array) -> BlockFit:
    """`fit` with the integers of every group, or those one beside them, under which it is stored best."""
    assert scheme.blocks is not None
    assert fit.sub_scale is not None
    lowest, highest = map(jnp.float32, sub_range(scheme.blocks))
    near = np.array([0, -1, 1], np.float32)
    moves = np.stack(np.meshgrid(near, near if fit.sub_minimum is not None else near[:1]), axis=-1).reshape(-1, 2)
    move = lambda value, by: None if value is None else jnp.clip(value + by, lowest, highest)

    def attempt(best: tuple, by: jax.Array) -> tuple[tuple, None]:
        tried = fit._replace(sub_scale=move(fit.sub_scale, by[0]), sub_minimum=move(fit.sub_minimum, by[1]))
        step, offset = tried.step[..., None, :], None if tried.offset is None else tried.offset[..., None, :]
        difference = decode(encode(x, step, offset, scheme), step, offset, scheme) - x
        error = sum_rows(weight * difference * difference)
        integers = tuple(a for a in (tried.sub_scale, tried.sub_minimum) if a is not None)
        return _better(best, (*integers, error)), None

    integers = tuple(a for a in (fit.sub_scale, fit.sub_minimum) if a is not None)
    (*found, _), _ = jax.lax.scan(attempt, (*integers, jnp.full_like(fit.sub_scale, jnp.inf)), jnp.asarray(moves))
    return fit._replace(sub_scale=found[0], sub_minimum=found[1] if len(found) > 1 else None)
