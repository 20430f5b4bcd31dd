"""A matmul over stacked experts, read expert by expert, so that each is a weight of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mpq.tracing import layout
from mpq.tracing.reads import Read, Source, dot_read


@dataclasses.dataclass(frozen=True)
class Split:
    """A matmul that is evaluated once for every expert.

    Attributes:
      reads: number of every expert's read.
      dims: the dimension of either operand along which it is sliced; None if every expert gets all of it.
      joined: the dimension of the output along which the results are joined.
    """

    reads: tuple[int, ...]
    dims: tuple[int | None, ...]
    joined: int


def by_expert(eqn: Any, sources: Sequence[Source], read: Read) -> tuple[list[Read], tuple[int | None, ...], int]:
    """The reads of every expert.

    Args:
      eqn: a `dot_general`.
      sources: of its operands.
      read: what it is as a whole; `read.stack` is not None.

    Returns:
      The reads, and `dims` and `joined` of their `Split`. Experts have an input each, even where it is one array: a
      common one would make them one fused group.
    """
    (lhs_contracting, rhs_contracting), batch = eqn.params["dimension_numbers"]
    dim, w = read.stack, read.operand
    assert dim is not None
    dims: list[int | None] = [None, None]
    dims[w] = dim
    if dim in batch[w]:
        joined = tuple(batch[w]).index(dim)
        dims[1 - w] = batch[1 - w][joined]
    else:
        free = [
            (operand, d)
            for operand, contracting in enumerate((lhs_contracting, rhs_contracting))
            for d in range(len(sources[operand].axes))
            if d not in contracting and d not in batch[operand]
        ]
        joined = len(batch[w]) + free.index((w, dim))

    one = lambda aval, d: _with_size(aval, d, 1)
    avals = [one(v.aval, d) for v, d in zip(eqn.invars, dims, strict=True)]
    out = one(eqn.outvars[0].aval, joined)
    other = Source(-1, layout.identity(avals[1 - w].shape))
    reads = []
    for expert in range(read.slot.shape[0]):
        weight = sources[w].at(dim, expert)
        assert weight is not None
        weight = Source(weight.root, (*weight.axes[:dim], (), *weight.axes[dim:]))
        part = dot_read(eqn.params, w, weight, other, avals, out)
        reads.append(dataclasses.replace(part, input=(read.input, expert), stack=None))
    return reads, tuple(dims), joined


def _with_size(aval: Any, dim: int | None, size: int) -> jax.ShapeDtypeStruct:
    shape = tuple(size if d == dim else length for d, length in enumerate(aval.shape))
    return jax.ShapeDtypeStruct(shape, aval.dtype)
