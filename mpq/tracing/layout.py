"""Where the elements of an array sit in the array that it was made from by reshapes and transposes.

Every axis of such an array is a product of *factors*: mixed-radix digits of the axes of the original. A transpose
permutes axes, a reshape merges neighbouring factors or splits one, and two arrays of equal factors hold equal
elements in equal order.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax

BATCH, ROW, COLUMN = range(3)
"""Roles of the parts of an axis in a matrix view `[batch, rows, columns]`."""


class Factor(NamedTuple):
    """One digit of an axis of the original array: `index // stride % size`. Factors of size 1 are left out."""

    axis: int
    stride: int
    size: int


Axes = tuple[tuple[Factor, ...], ...]
"""The factors of every axis of an array, slowest first."""


class Part(NamedTuple):
    """A part of an axis: its role in the matrix view, its rank among the parts of that role, its size."""

    role: int
    rank: tuple[int, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """An array as `[batch, rows, columns]`: split axes, permute, merge. Static and hashable."""

    source: tuple[int, ...]
    split: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, int, int]

    def __call__(self, array: jax.Array) -> jax.Array:
        """`array` of shape `source` to `[batch, rows, columns]`."""
        return array.reshape(self.split).transpose(self.permutation).reshape(self.shape)

    def invert(self, matrix: jax.Array) -> jax.Array:
        """`matrix[batch, rows, columns]` to an array of shape `source`; inverse of the call."""
        permuted = tuple(self.split[axis] for axis in self.permutation)
        inverse = sorted(range(len(permuted)), key=self.permutation.__getitem__)
        return matrix.reshape(permuted).transpose(inverse).reshape(self.source)


def matrix_view(shape: Sequence[int], parts: Sequence[Part]) -> MatrixView:
    """The view of an array of `shape` whose axes consist of `parts`, given in the order of the axes."""
    order = sorted(range(len(parts)), key=lambda i: parts[i][:2])
    batch, rows, columns = (math.prod(p.size for p in parts if p.role == role) for role in (BATCH, ROW, COLUMN))
    return MatrixView(tuple(shape), tuple(p.size for p in parts), tuple(order), (batch, rows, columns))


def features_last(shape: Sequence[int], axis: int) -> MatrixView:
    """The view `[1, positions, features]` of an array whose features lie along `axis`."""
    roles = [COLUMN if d == axis else ROW for d in range(len(shape))]
    return matrix_view(shape, [Part(role, (d,), shape[d]) for d, role in enumerate(roles)])


def parts(role: int, factors: Iterable[Factor]) -> list[Part]:
    """Factors of a weight as parts of a role, ranked in the weight's own memory order."""
    return [Part(role, (f.axis, -f.stride), f.size) for f in factors]


def in_memory_order(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Factors sorted as they lie in the original array."""
    return tuple(sorted(factors, key=lambda f: (f.axis, -f.stride)))


def identity(shape: Sequence[int]) -> Axes:
    """The factors of an original array."""
    return tuple((Factor(axis, 1, size),) if size > 1 else () for axis, size in enumerate(shape))


def merge(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Join neighbours that are consecutive digits of one axis."""
    merged: list[Factor] = []
    for factor in factors:
        if merged and merged[-1].axis == factor.axis and merged[-1].stride == factor.stride * factor.size:
            factor = Factor(factor.axis, factor.stride, merged.pop().size * factor.size)
        merged.append(factor)
    return tuple(merged)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The factors after a row-major reshape to `shape`; None if an axis would begin or end inside a digit."""
    if 0 in shape:
        return None
    pending = list(reversed(merge(factor for axis in axes for factor in axis)))
    result = []
    for size in shape:
        taken = []
        while size > 1:
            factor = pending.pop()
            if factor.size > size and factor.size % size == 0:
                rest = factor.size // size
                pending.append(Factor(factor.axis, factor.stride, rest))
                factor = Factor(factor.axis, factor.stride * rest, size)
            if size % factor.size:
                return None
            taken.append(factor)
            size //= factor.size
        result.append(tuple(taken))
    return tuple(result)


def canonical(shape: Sequence[int], factors: Iterable[Factor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split and permutation that bring an array of `shape` into the order of `factors`, which cover it once.

    Returns:
      `(split, permutation)`: reshape to `split` (`()` if that is `shape` itself), then transpose by `permutation`. Axes
      of size 1 stay behind the axis that they follow, so that an array already in order keeps the identity.
    """
    order = list(merge(factors))
    for axis, size in enumerate(shape):
        if size == 1:
            before = [i for i, factor in enumerate(order) if factor.axis == axis - 1]
            order.insert(before[-1] + 1 if before else 0, Factor(axis, 1, 1))
    pieces = in_memory_order(order)
    split = tuple(piece.size for piece in pieces)
    return () if split == tuple(shape) else split, tuple(pieces.index(factor) for factor in order)
