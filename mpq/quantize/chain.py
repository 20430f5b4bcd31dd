"""What rows of a weight take over of each other's errors: the factor of a damped gram, and products with it.

Write the damped gram as H = R RT with R upper triangular. The loss of the error e of a column is then
sum_j (sum_{i <= j} R_ij e_i)^2: row j takes over R_ij / R_jj of the error of every row i before it.

Products with triangular matrices go by slabs of rows, and skip those that are zero.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mpq.quantize.loss import by_span, dot

X = TypeVar("X")
Y = TypeVar("Y")

_SLAB = 512  # rows whose effect on later ones is one matrix product


class Chain(NamedTuple):
    """The damped gram H = R RT of rows in the order of their places, as what rows take over from each other.

    Attributes:
      links: `float32[places, places]`, unit lower triangular: [j, i] is R_ij / R_jj, what row j takes over of the error
        of row i.
      weight: `float32[places]`, R_jj^2, and 0 without a row: the loss is sum_j weight_j (links e)_j^2, less `damping`
        sum_j e_j^2.
      share: `float32[places]`, sum_i R_ij^2: what row j adds to the loss of independent errors of variance 1.
      damping: `float32`, what was added to the gram's diagonal.
      solve: `float32[chunks, size, size]`, the inverses of the diagonal blocks of `links`; None: there is one block.
    """

    links: jax.Array
    weight: jax.Array
    share: jax.Array
    damping: jax.Array
    solve: jax.Array | None


@functools.partial(jax.jit, static_argnames="chunks")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None))
def factor(gram: jax.Array, place: jax.Array | None, damping: jax.Array, chunks: int) -> Chain:
    """Of R RT = gram + damping * mean(diagonal) * I. Places without a row are free of all others."""
    mean = gram.diagonal().mean()
    mean = jnp.where(mean > 0, mean, 1.0)
    filled = True if place is None else place < len(gram)
    empty = jnp.where(filled, 0.0, mean)
    gram = at_places(at_places(gram, place).T, place)
    every = jnp.arange(len(gram))

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        damping, _, _ = state
        damped = gram.at[every, every].add(empty + damping * mean)
        lower = jax.lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        return jnp.maximum(10 * damping, 1e-6), damping, lower

    # A gram that is positive semidefinite up to rounding is factored long before 1e3; any other ends as NaN, and so as
    # RTN. A factorization that fails is NaN everywhere.
    failed = lambda state: ~jnp.isfinite(state[2].diagonal()).all() & (state[0] < 1e3)
    _, used, lower = jax.lax.while_loop(failed, attempt, attempt((damping, damping, gram)))
    root = lower.diagonal()[::-1]
    links = lower[::-1, ::-1].T / root[:, None]
    solve = None
    if chunks > 1:
        size = len(gram) // chunks
        blocks = links.reshape(chunks, size, chunks, size)[jnp.arange(chunks), :, jnp.arange(chunks)]
        unit = jnp.broadcast_to(jnp.eye(size), blocks.shape)
        solve = jax.lax.linalg.triangular_solve(blocks, unit, left_side=True, lower=True, unit_diagonal=True)
    # Without a row there is no error, though no level may be 0.
    weight, share = jnp.where(filled, root**2, 0.0), jnp.sum(lower**2, axis=0)[::-1]
    return Chain(links, weight, share, used * mean, solve)


def before(links: jax.Array, error: jax.Array, count: jax.Array, block: int) -> jax.Array:
    """`links[rows, k] @ error[k, n]`, where only the first `count` rows, whole blocks of `block`, hold an error."""
    slab = _slab(len(error), block, _SLAB if len(error) > _SLAB else _SLAB // 4)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(links, index * slab, slab, axis=1)
        return total + dot(some, jax.lax.dynamic_slice_in_dim(error, index * slab, slab))

    return jax.lax.fori_loop(0, -(-count // slab), add, jnp.zeros((len(links), error.shape[1])))


def in_turn(
    step: Callable[[jax.Array, jax.Array, X], tuple[jax.Array, Y]],
    links: jax.Array,
    pull: jax.Array,
    xs: X,
) -> tuple[jax.Array, Y]:
    """Parts of rows one after another, each with what all before it add to its targets.

    Args:
      step: (`pull[size, n]`, `links[size, size]`, x) -> error `[size, n]`, y; of one part.
      links: `[rows, rows]`, as in `Chain`.
      pull: `[rows, n]`, what rows outside of these add.
      xs: what each part is given, `[parts, ...]`.

    Returns:
      error `[rows, n]`, and `[parts, ...]` of every y.
    """
    parts = len(jax.tree.leaves(xs)[0])
    size = len(pull) // parts
    slab = _slab(len(pull), size, _SLAB)
    if parts == 1:  # nothing to collect from earlier parts, and one loop less to compile
        error, y = step(pull, links, jax.tree.map(lambda a: a[0], xs))
        return error, jax.tree.map(lambda a: a[None], y)
    if size < slab < len(pull):  # what is before a slab is summed for all its parts at once
        each = jax.tree.map(lambda a: a.reshape(-1, slab // size, *a.shape[1:]), xs)
        error, y = in_turn(lambda pull, links, x: in_turn(step, links, pull, x), links, pull, each)
        return error, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), y)

    def part(error: jax.Array, row: tuple[jax.Array, X]) -> tuple[jax.Array, Y]:
        start, x = row
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size)
        here = jax.lax.dynamic_slice_in_dim(rows(links), start, size, axis=1)
        new, y = step(rows(pull) + before(rows(links), error, start, size), here, x)
        return jax.lax.dynamic_update_slice_in_dim(error, new, start, 0), y

    return jax.lax.scan(part, jnp.zeros_like(pull), (jnp.arange(parts) * size, xs))


def below(loss: jax.Array, chain: Chain, error: jax.Array, span: int) -> jax.Array:
    """Whether `loss[n]` is below the loss of `error[places, n]`, of which no more is summed than decides it.

    Columns of a span are compared together. Rows that should hold most of the loss come first, as many as should
    decide: where few inputs are large these are few.
    """
    k, slab, size = len(error), _slab(len(error), 1, _SLAB // 2), jnp.sum(error**2, axis=0)
    loss = by_span(loss + chain.damping * size, span)
    enough = jnp.max(loss / by_span(size / k, span))  # of all shares, were errors independent
    ranked = jnp.argsort(-chain.share)
    count = -(-jnp.sum(jnp.cumsum(chain.share[ranked]) < enough) // slab) * slab
    later = jnp.zeros(k, bool).at[ranked].set(jnp.arange(k) >= count)
    order = jnp.argsort(later, stable=True)  # ascending but for that: products stay triangular

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, total = state
        rows = jax.lax.dynamic_slice_in_dim(order, start, slab)
        taken = before(chain.links[rows], error, rows[-1] + 1, 1)
        return start + slab, total + jnp.sum(chain.weight[rows][:, None] * taken**2, axis=0)

    def open_still(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < k) & ~(loss < by_span(state[1], span)).all()

    return loss < by_span(jax.lax.while_loop(open_still, more, (jnp.int32(0), jnp.zeros_like(loss)))[1], span)


def _slab(rows: int, block: int, most: int) -> int:
    """Rows that a product takes at once, at most `most`: whole blocks, at least one, and they divide `rows`."""
    blocks = rows // block
    return block * max(m for m in range(1, blocks + 1) if blocks % m == 0 and (m == 1 or m * block <= most))


def at_places(a: jax.Array, place: jax.Array | None) -> jax.Array:
    """Rows of `a[k, ...]` at their places; 0 where there is none. None: all are at theirs."""
    return a if place is None else a.at[place].get(mode="fill", fill_value=0)


def unplace(a: jax.Array, place: jax.Array | None, k: int) -> jax.Array:
    """Inverse of `at_places`."""
    return a if place is None else jnp.zeros((k, *a.shape[1:]), a.dtype).at[place].set(a, mode="drop")
