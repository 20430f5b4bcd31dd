"""What rows of a weight take over of each other's errors: the factor of a damped gram, and products with it.

Write the damped gram as H = R RT with R upper triangular. The loss of the error e of a column is then
sum_j (sum_{i <= j} R_ij e_i)^2: row j takes over R_ij / R_jj of the error of every row i before it.

Products with triangular matrices go by slabs of rows, and skip those that are zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpq.quantize.loss import by_span, dot

_SLAB = 512  # rows whose effect on later ones is one matrix product


class Chain(NamedTuple):
    """The damped gram H = R RT of rows in the order of their places, as what rows take over from each other.

    Attributes:
      links: `float32[places, places]`, unit lower triangular: [j, i] is R_ij / R_jj, what row j takes over of the error
        of row i.
      weight: `float32[places]`, R_jj^2: the loss is sum_j weight_j (links e)_j^2, less `damping` sum_j e_j^2.
      damping: `float32`, what was added to the gram's diagonal.
      solve: `float32[chunks, size, size]`, the inverses of the diagonal blocks of `links`; None: there is one block.
    """

    links: jax.Array
    weight: jax.Array
    damping: jax.Array
    solve: jax.Array | None


@functools.partial(jax.jit, static_argnames="chunks")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None))
def factor(gram: jax.Array, place: jax.Array, damping: jax.Array, chunks: int) -> Chain:
    """Of R RT = gram + damping * mean(diagonal) * I. Places without a row are free of all others."""
    mean = gram.diagonal().mean()
    mean = jnp.where(mean > 0, mean, 1.0)
    empty = jnp.where(place == gram.shape[0], mean, 0.0)
    gram = at_places(at_places(gram, place).T, place)
    every = jnp.arange(len(place))

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        damping, _, _ = state
        damped = gram.at[every, every].add(empty + damping * mean)
        lower = jax.lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        return jnp.maximum(10 * damping, 1e-6), damping, lower

    # A gram that is positive semidefinite up to rounding is factored long before 1e3; any other ends as NaN, and so as
    # RTN.
    failed = lambda state: ~jnp.isfinite(state[2]).all() & (state[0] < 1e3)
    _, used, lower = jax.lax.while_loop(failed, attempt, attempt((damping, damping, gram)))
    root = lower.diagonal()[::-1]
    links = lower[::-1, ::-1].T / root[:, None]
    solve = None
    if chunks > 1:
        size = len(place) // chunks
        blocks = links.reshape(chunks, size, chunks, size)[jnp.arange(chunks), :, jnp.arange(chunks)]
        unit = jnp.broadcast_to(jnp.eye(size), blocks.shape)
        solve = jax.lax.linalg.triangular_solve(blocks, unit, left_side=True, lower=True, unit_diagonal=True)
    return Chain(links, root**2, used * mean, solve)


def before(links: jax.Array, error: jax.Array, count: jax.Array, block: int) -> jax.Array:
    """`links[rows, k] @ error[k, n]`, where only the first `count` rows, whole blocks of `block`, hold an error."""
    slab = _slab(len(error), block)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(links, index * slab, slab, axis=1)
        return total + dot(some, jax.lax.dynamic_slice_in_dim(error, index * slab, slab))

    return jax.lax.fori_loop(0, -(-count // slab), add, jnp.zeros((len(links), error.shape[1])))


def below(loss: jax.Array, chain: Chain, error: jax.Array, span: int) -> jax.Array:
    """Whether `loss[n]` is below the damped loss of `error[places, n]`, of which no more is summed than decides it.

    Columns of a span are compared together.
    """
    loss = by_span(loss, span)
    slab = _slab(len(error), 1)

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, total = state
        links, weight = (jax.lax.dynamic_slice_in_dim(a, start, slab) for a in (chain.links, chain.weight))
        taken = before(links, error, start + slab, 1)
        return start + slab, total + jnp.sum(weight[:, None] * taken**2, axis=0)

    def open_still(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < len(error)) & ~(loss < by_span(state[1], span)).all()

    return loss < by_span(jax.lax.while_loop(open_still, more, (jnp.int32(0), jnp.zeros_like(loss)))[1], span)


def _slab(rows: int, block: int) -> int:
    """Rows that a product takes at once: whole blocks, and they divide `rows`."""
    blocks = rows // block
    return block * max(m for m in range(1, blocks + 1) if blocks % m == 0 and (m == 1 or m * block <= _SLAB))


def at_places(a: jax.Array, place: jax.Array) -> jax.Array:
    """Rows of `a[k, ...]` at their places; 0 where there is none."""
    return a.at[place].get(mode="fill", fill_value=0)


def unplace(a: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """Inverse of `at_places`."""
    return jnp.zeros((k, *a.shape[1:]), a.dtype).at[place].set(a, mode="drop")
