"""Some output columns at a time: they are independent, so this only bounds memory and the number of compilations."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from mpq.types import QTensor

T = TypeVar("T")

_WIDE = 2048  # columns from which compiling once for all widths saves less than larger steps do


def width(n: int, columns: int) -> int:
    """Columns of a tile: `columns`, and up to sixteen times as many of wide weights, which are cut evenly."""
    if n < _WIDE:
        return columns
    tiles = -(-n // (16 * columns))
    return -(-n // (tiles * columns)) * columns


def cut(tree: T, n: int, tile: int) -> list[T]:
    """`[..., n]` arrays in tiles of so many columns, the last one filled up with copies of the last column.

    What all columns share, `[..., 1]`, comes whole in every tile.
    """
    return [tree] if n == tile else _cut(tree, n, tile)


# `_cut` and `join` compile once for a shape; operation by operation they would be five programs.
@functools.partial(jax.jit, static_argnames=("n", "tile"))
def _cut(tree: T, n: int, tile: int) -> list[T]:
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, -n % tile)), mode="edge")
    part = lambda a, at: a if a.shape[-1] == 1 < n else pad(a)[..., at : at + tile]
    return [jax.tree.map(functools.partial(part, at=at), tree) for at in range(0, n, tile)]


@functools.partial(jax.jit, static_argnames="n")
def join(parts: list[T], n: int) -> T:
    """Inverse of `cut`."""
    shared = lambda a: a.shape[-1] == 1 and len(parts) < n
    return jax.tree.map(lambda *a: a[0] if shared(a[0]) else jnp.concatenate(a, axis=-1)[..., :n], *parts)


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
    return join([learn(*part) for part in cut((w, start), n, tile)], n)
