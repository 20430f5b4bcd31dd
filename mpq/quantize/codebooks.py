"""Levels of learned tables: weighted k-means in one dimension, in turn with the search of scales.

SqueezeLLM (Kim et al. 2023, arXiv:2306.07629, eq. 2) takes for the levels of a channel those of the smallest weighted
squared error: k-means, which in one dimension dynamic programming solves, as clusters are intervals (Wang and Song
2011, "Ckmeans.1d.dp", The R Journal 3(2)). Here that is solved on a histogram, and Lloyd's steps on the values
themselves follow. The root mean square error is so within one bin's width of that of the best table whose first level
is -1: moving every value to the middle of its bin changes that of any table by half a width at most.

Scales are searched in turn with levels, each for what the other found, if they are searched at all. A fixed table
(evenly spaced as integers, or NF3 and NF4) is taken for the start where it is the better one. So the weighted error is
never above that of these tables under the same search, up to what half precision moves their levels.

Differences from the paper: weights are what a group's scale and a row's inputs make of an error, not the Fisher
information; the first level is -1, since scales stand before the table; and everything is deterministic.

It costs up to six searches of the scales of a whole matrix, where NF4 needs one. Sums go by column, and then over the
sorted columns, so that the order of columns does not matter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpq.formats.codebook import NF3_LEVELS, NF4_LEVELS
from mpq.types import Scheme

BINS = 512
"""Of the histogram, over -1 .. 1."""

_WHOLE = 2**30  # what weights add up to in the histogram: integers, so that no order of adding them matters
_FAR = 2.0  # values are clipped there: what lies beyond has the outermost level anyway
_STEPS, _TURNS = 4, 3

_State = tuple[jax.Array, jax.Array, jax.Array]  # levels, scales and the error that they leave

FIXED = {
    2: (tuple(np.arange(-2, 2) / 2),),
    3: (tuple(np.arange(-4, 4) / 4), NF3_LEVELS),
    4: (tuple(np.arange(-8, 8) / 8), NF4_LEVELS),
}
"""Tables by width that are tried as starts."""


def fit(
    x: jax.Array,
    row: jax.Array,
    scheme: Scheme,
    fit_scale: Callable[[jax.Array | None, str], jax.Array],
    search: bool,
) -> jax.Array:
    """`float16[levels, 1]` of one matrix.

    Args:
      x: `float32[groups, rows, n]`.
      row: `float32[groups, rows, 1]`, weight of each row's squared error; 0 where a row only fills up a group.
      scheme: one with learned levels.
      fit_scale: levels, of which absmax needs none, and a method of `scales` -> scales, which broadcast against `x`.
      search: whether scales are searched, too, or those of absmax.
    """

    def turn(index: jax.Array, best: _State) -> _State:
        levels, scale, least = best
        moved = refine(x / scale, _weight(row, scale), levels[:, 0].astype(jnp.float32))
        begin = starts[jnp.minimum(index, len(starts) - 1)]
        levels = jnp.where(index < len(starts), begin, moved.astype(jnp.float16)[:, None])
        scale = fit_scale(levels, "mse") if search else scale
        grid = scheme.with_levels(levels).format
        loss = total(row * (grid.decode(grid.encode(x / scale)) * scale - x) ** 2)
        return jax.tree.map(lambda new, old: jnp.where(loss < least, new, old), (levels, scale, loss), best)

    scale = fit_scale(None, "absmax")
    own = start(x / scale, _weight(row, scale), 2**scheme.format.bits)
    tables = refine(x / scale, _weight(row, scale), own), *FIXED[scheme.format.bits]
    starts = jnp.stack([jnp.asarray(levels, jnp.float16)[:, None] for levels in tables])
    first = starts[0], scale, jnp.float32(jnp.inf)
    return jax.lax.fori_loop(0, len(starts) + _TURNS, turn, first)[0]


def _weight(row: jax.Array, scale: jax.Array) -> jax.Array:
    """Of squared errors in units of the scale."""
    return row * (scale / jnp.abs(scale).max()) ** 2


def total(a: jax.Array) -> jax.Array:
    """Sum of `a[..., n]`, the same for any order of the columns."""
    return jnp.sort(a.sum(axis=tuple(range(a.ndim - 1)))).sum()


def start(x: jax.Array, weight: jax.Array, count: int) -> jax.Array:
    """Levels of the smallest weighted squared error of a histogram.

    Args:
      x: `float32[..., n]`, values over their scales.
      weight: `float32`, of their squared errors; broadcasts against them, and is above 0 somewhere.
      count: of levels, at least 2.

    Returns:
      `float32[count]`, ascending, the first -1.
    """
    weight = jnp.broadcast_to(weight, x.shape)
    share = jnp.round(weight / total(weight) * np.float32(_WHOLE)).astype(jnp.int32)
    at = jnp.clip(jnp.floor((jnp.clip(x, -_FAR, _FAR) + 1) * (BINS / 2)), 0, BINS - 1).astype(jnp.int32)
    held = jnp.zeros(BINS, jnp.int32).at[at.reshape(-1)].add(share.reshape(-1)).astype(jnp.float32) / _WHOLE
    middle = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) * (2 / BINS) - 1
    sums = jnp.cumsum(jnp.stack([held, held * middle, held * middle**2]), axis=-1)
    sums = jnp.pad(sums, ((0, 0), (1, 0)))
    mass, first, second = sums[:, None, :] - sums[:, :, None]  # of the bins from a row's index up to a column's
    edge = jnp.arange(BINS + 1)
    cost = jnp.maximum(second - first**2 / jnp.where(mass > 0, mass, 1.0), 0.0)
    cost = jnp.where(edge[:, None] <= edge, cost, jnp.inf)

    def one_more(least: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        """Least cost up to every edge with one level more, and where that level's bins begin."""
        every = least[:, None] + cost
        return every.min(axis=0), every.argmin(axis=0)

    below = sums[2] + 2 * sums[1] + sums[0]  # of the first level: squared distances to -1
    begins = jax.lax.scan(one_more, below, None, length=count - 1)[1]

    def level(end: jax.Array, begin: jax.Array) -> tuple[jax.Array, jax.Array]:
        """From the last level down; one without values lies where its bins would begin."""
        begin = begin[end]
        mass, first, _ = sums[:, end] - sums[:, begin]
        empty = begin.astype(jnp.float32) * (2 / BINS) - 1
        return begin, jnp.where(mass > 0, first / jnp.where(mass > 0, mass, 1.0), empty)

    levels = jax.lax.scan(level, jnp.int32(BINS), begins, reverse=True)[1]
    return jnp.concatenate([jnp.full(1, -1.0), levels])


def refine(x: jax.Array, weight: jax.Array, levels: jax.Array) -> jax.Array:
    """Levels after a few of Lloyd's steps: each but the first goes to the mean of the values nearest to it.

    No step raises the error.

    Args:
      x: as of `start`.
      weight: as of `start`.
      levels: `float32[count]`, ascending, the first -1.
    """
    x = jnp.clip(x, -_FAR, _FAR)
    weight = jnp.broadcast_to(weight, x.shape)
    weight = weight / total(weight)

    def one_step(_: int, levels: jax.Array) -> jax.Array:
        middles = (levels[1:] + levels[:-1]) / 2
        code = sum((x > middles[i]).astype(jnp.int8) for i in range(len(middles)))

        def mean(index: jax.Array) -> jax.Array:
            own = jnp.where(code == index, weight, 0.0)
            mass = total(own)
            return jnp.where(mass > 0, total(own * x) / jnp.where(mass > 0, mass, 1.0), levels[index])

        means = jax.lax.map(mean, jnp.arange(1, len(levels), dtype=jnp.int8))
        return jnp.concatenate([levels[:1], jnp.clip(means, -1.0, 1.0)])

    return jax.lax.fori_loop(0, _STEPS, one_step, levels)
