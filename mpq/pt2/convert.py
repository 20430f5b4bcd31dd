"""Walks the jaxpr of a model, traced once for every batch and length, and emits a graph of PyTorch.

A weight is dequantized where it is read, and read as any other array. Where the plan has a static range for what it
multiplies, both are integers first (`mpq.pt2.activations`). What depends on constants alone is computed here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.export.graphs import READS, Reads, feature_axes, is_rows_product
from mpq.export.jaxprs import Param, dtype_of, shape_of, walk
from mpq.pt2.activations import Activations
from mpq.pt2.graph import Graph
from mpq.pt2.ops import OPS, convolution, permuted
from mpq.pt2.weights import Weights, has_integers
from mpq.types import MpqError, QTensor, WeightSpec

_FOLDED = 2**14  # elements of a constant that is computed here
_KNOWN = 2**12  # elements of a parameter that is taken as a constant: norms and biases


class Converter:
    """One conversion."""

    def __init__(
        self,
        graph: Graph,
        specs: Mapping[str, WeightSpec],
        qtensors: Mapping[str, QTensor],
        params: Mapping[str, np.ndarray],
        rows: Sequence[RoundedActivation] = (),
    ) -> None:
        """Prepare.

        Args:
          graph: to add to.
          specs: parameter path -> the weight that it is.
          qtensors: weight path -> quantized weight.
          params: every other parameter, in the dtype that it is stored in.
          rows: activations that are rounded.
        """
        self._graph, self._specs, self._qtensors, self._params = graph, specs, qtensors, params
        self._weights, self._reads, self._rows = Weights(graph, qtensors), Reads(specs), tuple(rows)
        self._activations = Activations(graph, (), "")
        self._arrays: dict[str, Any] = {}
        self._small: dict[int, tuple[str, np.ndarray]] = {}  # parameters that are constants, by identity
        self._permuted: dict[tuple[Any, tuple[int, ...]], Any] = {}

    def run(self, closed: Any, paths: list[str], shape: Sequence[Any], name: str) -> Any:
        """Emit the whole function; the node of its output.

        Args:
          closed: its jaxpr, whose first arguments are the parameters in the order of `paths`.
          paths: of the parameters.
          shape: of the input.
          name: of the input.
        """
        graph = self._graph
        x = graph.input(name)
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int):
                graph.symbols[str(dim)] = graph.one(graph.torch.ops.aten.sym_size.int, x, axis)
        self._activations = Activations(graph, self._rows, shape[0])
        x = graph.cast(x, dtype_of(closed.jaxpr.invars[-1]).name)
        (result,) = walk(closed.jaxpr, closed.consts, [*map(self._parameter, paths), x], self._emit, folded=_FOLDED)
        if self._rows:
            self._reads.require_all()
        return self._node(result, closed.jaxpr.outvars[0])

    def _parameter(self, path: str) -> Any:
        """A small one by its values, so that what a norm makes of it is computed here."""
        value = self._params.get(path)
        if path in self._specs or value is None or value.size > _KNOWN:
            return Param(path)
        known = value.astype(np.float32)
        self._small[id(known)] = path, known
        return known

    def _emit(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name not in OPS:
            raise MpqError(f"the operation {name!r} has no form in PyTorch here: export this model to another runtime")
        if self._rows and name in READS:
            values, made = self._read(eqn, values)
            if made is not None:
                return [made]
        inputs = [self._node(v, var) for v, var in zip(values, eqn.invars, strict=True)]
        made = OPS[name](self._graph, eqn, inputs)
        if isinstance(made, list):
            return made
        self._reads.follow(eqn, inputs[0] if inputs else "", made)
        return [made]

    def _read(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Any]:
        """The operands of what may read a weight, the other one rounded as the plan says; or the whole product."""
        if (read := self._reads.next(values)) is None:
            return values, None
        spec, use, w = read
        if use.kind == "embedding" or (row := self._activations.of(use.input)) is None:
            return values, None
        var, kernel = eqn.invars[1 - w], values[w]
        x, shape, axes = self._node(values[1 - w], var), shape_of(var), feature_axes(eqn, 1 - w)
        integers = row.limits is not None and has_integers(spec, self._qtensors[spec.path].scheme, use.kind)
        if integers and w == 1 and isinstance(kernel, Param):
            if eqn.primitive.name == "conv_general_dilated" and not kernel.transposed:
                return values, self._convolution(eqn, row, x, spec)
            if eqn.primitive.name == "dot_general" and is_rows_product(eqn, kernel, spec):
                rounded = self._activations.rounded(row, x, shape, axes)
                rows = self._weights.integers(spec, tuple(reversed(spec.permutation)))
                return values, self._graph.one(self._graph.torch.nn.functional.linear, rounded, rows)
        rounded = self._activations.rounded(row, x, shape, axes)
        return [rounded, values[1]] if w == 1 else [values[0], rounded], None

    def _convolution(self, eqn: Any, row: RoundedActivation, x: Any, spec: WeightSpec) -> Any:
        """Channels go first before the value is rounded: nothing lies between its integers and the convolution then."""
        numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
        order = tuple(map(int, numbers.lhs_spec))
        if (x, order) not in self._permuted:
            self._permuted[x, order] = permuted(self._graph, x, order)
        x = self._activations.rounded(row, self._permuted[x, order], [shape[axis] for axis in order], (1,))
        kernel = self._weights.integers(spec, tuple(map(int, numbers.rhs_spec)))
        return convolution(self._graph, eqn, x, kernel)

    def _node(self, value: Any, var: Any) -> Any:
        if isinstance(value, np.ndarray):
            if id(value) in self._small:
                return self._array(self._small[id(value)][0])
            return self._graph.constant(np.asarray(value, dtype_of(var)))
        if not isinstance(value, Param):
            return value
        array = self._array(value.path)
        array = permuted(self._graph, array, (1, 0)) if value.transposed else array
        self._reads.made(array, value.path)
        return array

    def _array(self, path: str) -> Any:
        """A parameter as an array, made once."""
        if path in self._specs:
            return self._weights.dequantized(self._specs[path])
        if path not in self._arrays:
            value = self._params[path]
            stored = self._graph.store(path, value)
            self._arrays[path] = stored if value.dtype == np.float32 else self._graph.cast(stored, "float32")
        return self._arrays[path]
