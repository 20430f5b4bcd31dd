"""Some output columns at a time: they are independent, so this only bounds memory and the number of compilations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpq.types import QTensor

_WIDE = 2048  # columns from which compiling once for all widths saves less than larger steps do


def width(n: int, columns: int) -> int:
    """Columns of a tile: `columns`, and up to sixteen times as many of wide weights, which are cut evenly."""
    if n < _WIDE:
        return columns
    tiles = -(-n // (16 * columns))
    return -(-n // (tiles * columns)) * columns


# `cut` and `join` compile once for a shape; operation by operation they would be five programs.
@functools.partial(jax.jit, static_argnames="tile")
def cut(w: jax.Array, tile: int) -> list[jax.Array]:
    """`w[batch, k, n]` in tiles of so many columns, the last one filled up with zeros."""
    w = jnp.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % tile)))
    return jnp.split(w, w.shape[2] // tile, axis=2)


@functools.partial(jax.jit, static_argnames="n")
def join(parts: list[QTensor], n: int) -> QTensor:
    """The first `n` columns of what was made of all tiles."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=-1)[..., :n], *parts)


def by_columns(learn: Callable[[jax.Array, QTensor], QTensor], w: jax.Array, start: QTensor, columns: int) -> QTensor:
    """`learn(w, start)` of all columns, at most so many at once.

    Parts that all columns share, such as one scale of the matrix, come to every call whole.

    Args:
      learn: gives what begins as its second argument.
      w: `float32[batch, k, n]`.
      start: a quantization of it.
      columns: at once; fewer where `n` is less, so that small weights share compilations too.
    """
    n = w.shape[-1]
    tile = min(columns, 1 << (n - 1).bit_length())
    shared = lambda a: a.shape[-1] == 1 < n
    pad = lambda a: a if shared(a) else jnp.pad(a, ((0, 0), (0, 0), (0, -n % tile)), mode="edge")
    part = lambda a, at: a if shared(a) else jax.lax.dynamic_slice_in_dim(a, at, tile, axis=2)
    w, start = pad(w), jax.tree.map(pad, start)
    parts = [learn(part(w, at), jax.tree.map(lambda a, at=at: part(a, at), start)) for at in range(0, n, tile)]
    join = lambda *a: a[0] if shared(a[0]) else jnp.concatenate(a, axis=-1)[..., :n]
    return jax.tree.map(join, *parts)
