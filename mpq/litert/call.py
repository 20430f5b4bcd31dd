"""One equation of a jaxpr on its way into a LiteRT graph, and the shapes that go with it.

A value is the number of a tensor. A tensor may be smaller than what it stands for, with 1 where that has more: what is
broadcast stays small until an operator wants all of it (`Call.full`), since elementwise ones take it as it is. One
dimension of a shape may be open, the batch; it is -1 where LiteRT wants a shape.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.export.jaxprs import dtype_of, shape_of
from mpq.litert.graph import Graph, Quantization
from mpq.types import MpqError

NONE_ACTIVATION: dict[str, Any] = {"fusedActivationFunction": 0}


@dataclasses.dataclass(frozen=True)
class Call:
    """One equation of the jaxpr.

    Attributes:
      graph: to add to.
      eqn: the equation.
      inputs: numbers of the tensors that it reads, perhaps smaller than their values.
      codes: how the output is rounded to int8, as the input is; None: it is not.
    """

    graph: Graph
    eqn: Any
    inputs: list[int]
    codes: Quantization | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the output."""
        return shape_of(self.eqn.outvars[0])

    @property
    def dtype(self) -> str:
        """Of the output."""
        return dtype_of(self.eqn.outvars[0]).name if self.codes is None else "int8"

    def full(self, i: int) -> int:
        """Input `i` with the whole shape of its value."""
        return broadcast(self.graph, self.inputs[i], shape_of(self.eqn.invars[i]), dtype_of(self.eqn.invars[i]).name)

    def one(self, kind: str, *inputs: int, shape: Any = None, dtype: str | None = None, **options: Any) -> int:
        """An operator; shape and dtype of its output are those of the equation's unless they are given."""
        shape = self.shape if shape is None else shape
        dtype = dtype or self.dtype
        return self.graph.op(kind, inputs, shape, dtype, self.codes if dtype == "int8" else None, **options)

    def reshaped(self, value: int, shape: Sequence[Any], dtype: str | None = None) -> int:
        """`value` in another shape."""
        return reshape(self.graph, value, shape, dtype or self.dtype, self.codes)


def open_dims(shape: Sequence[Any]) -> list[int]:
    """Dimensions as LiteRT writes them: what is no number is -1.

    Raises:
      MpqError: more than one is open.
    """
    found = [int(d) if isinstance(d, int | np.integer) else -1 for d in shape]
    if found.count(-1) > 1:
        raise MpqError(f"a shape {tuple(map(str, shape))} with two open dimensions has no form in LiteRT here")
    return found


def merged(shape: Sequence[Any]) -> Any:
    """The product of dimensions, open if one of them is."""
    product: Any = 1
    for dim in shape:
        product = product * dim
    return product


def reshape(graph: Graph, value: int, shape: Sequence[Any], dtype: str, codes: Quantization | None = None) -> int:
    """`value` in another shape."""
    dims = open_dims(shape)
    if tuple(dims) == graph.shape_of(value):
        return value
    return graph.op("RESHAPE", [value, graph.constant(dims, np.int32)], shape, dtype, codes)


def broadcast(graph: Graph, value: int, shape: Sequence[Any], dtype: str) -> int:
    """`value` repeated to all of `shape`, which has as many dimensions."""
    dims, given = open_dims(shape), list(graph.shape_of(value))
    if dims == given:
        return value
    if -1 in dims and given[dims.index(-1)] == 1:
        ones = [-1 if d == -1 else 1 for d in dims]
        zeros = graph.op("CAST", [graph.batch_zeros()], [shape[dims.index(-1)]], dtype)
        zeros = graph.op("RESHAPE", [zeros, graph.constant(ones, np.int32)], placed(shape, ones), dtype)
        given = [d if d == -1 else g for d, g in zip(dims, given, strict=True)]
        value = graph.op("ADD", [value, zeros], placed(shape, given), dtype, **NONE_ACTIVATION)
        if dims == given:
            return value
    if -1 in dims:
        ones_shape = [1 if d == -1 else d for d in dims]
        grown = np.ones(ones_shape, dtype)
        return graph.op("MUL", [value, graph.constant(grown)], shape, dtype, **NONE_ACTIVATION)
    return graph.op("BROADCAST_TO", [value, graph.constant(dims, np.int32)], shape, dtype)


def placed(shape: Sequence[Any], dims: Sequence[int]) -> list[Any]:
    """`dims` with the open dimension of `shape`."""
    return [s if d == -1 else d for s, d in zip(shape, dims, strict=True)]


def like(call: Call, value: float) -> int:
    """A constant of the dtype of the first input, and as many dimensions."""
    var = call.eqn.invars[0]
    return call.graph.constant(np.full((1,) * len(shape_of(var)), value, dtype_of(var)))


def elementwise(call: Call, kind: str, *inputs: int, **options: Any) -> int:
    """An operator that broadcasts; the output may be smaller than its value, as the inputs may."""
    rank = len(call.shape)
    given = [(1,) * (rank - len(shape)) + shape for shape in map(call.graph.shape_of, inputs)]
    shape = [s if -1 in d else max(d) for s, *d in zip(call.shape, *given, strict=True)]
    return call.one(kind, *inputs, shape=shape, **options)
