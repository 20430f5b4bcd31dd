"""Walks the jaxpr of a model, traced once for every batch and length, and emits an ONNX graph.

A weight that a matmul reads as it is, or transposed, becomes `MatMulNBits` where that has its scheme; anywhere else it
is dequantized once and read as any other array. What depends on constants alone is computed here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.export.graphs import READS, Reads, feature_axes, is_rows_product, open_inputs
from mpq.export.jaxprs import Param, dtype_of, shape_of, trace_open, walk
from mpq.inputs import Tokens
from mpq.models import Model
from mpq.onnx import weights as nbits
from mpq.onnx.activations import Activations, is_integer
from mpq.onnx.graph import TYPES, Graph, Stored, Tensor
from mpq.onnx.ops import OPS, convolution
from mpq.types import MpqError, QTensor, WeightSpec

_FOLDED = 2**16  # elements of a constant that is computed here
_KNOWN = 2**12  # elements of a parameter that is taken as a constant: norms and biases


def traced(model: Model) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The jaxpr of a model for any batch, and of text any length within its context; its inputs and outputs.

    Raises:
      MpqError: the function depends on the length otherwise than by sums and products.
    """
    opened = open_inputs(model)
    closed = trace_open(model.apply, model.params, [opened], "batches or lengths, which one ONNX graph cannot")
    is_text = isinstance(model.inputs, Tokens)
    x = Tensor("input_ids" if is_text else "inputs", opened.shape, "int64" if is_text else opened.dtype.name)
    (out,) = closed.jaxpr.outvars
    return closed, [x], [Tensor("outputs", shape_of(out), dtype_of(out).name)]


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
        self._arrays: dict[str, str] = {}
        self._activations, self._rows = Activations(graph, (), ""), tuple(rows)
        self._reads = Reads(specs)

    def run(self, closed: Any, paths: list[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Emit the whole function; parameters are its first arguments, in the order of `paths`."""
        graph, values = self._graph, []
        for x in inputs:
            for axis, dim in enumerate(x.shape):
                if str(dim).isidentifier() and str(dim) not in graph.symbols:
                    graph.symbols[str(dim)] = graph.one("Shape", x.name, start=axis, end=axis + 1)
        self._activations = Activations(graph, self._rows, inputs[0].shape[0])
        for x, var in zip(inputs, closed.jaxpr.invars[len(paths) :], strict=True):
            same = dtype_of(var).name == x.dtype
            values.append(x.name if same else graph.one("Cast", x.name, to=TYPES[dtype_of(var).name]))
        results = walk(closed.jaxpr, closed.consts, [*map(self._parameter, paths), *values], self._emit, folded=_FOLDED)
        for result, var, out in zip(results, closed.jaxpr.outvars, outputs, strict=True):
            graph.result(self._name(result, var), out.name)
        if self._rows:
            self._reads.require_all()

    def _parameter(self, path: str) -> Any:
        """A small one in float32 by its values, so that what a norm makes of it is computed here."""
        value = self._params.get(path)
        if path in self._specs or value is None or value.dtype != np.float32 or value.size > _KNOWN:
            return Param(path)
        return np.asarray(value)

    def _emit(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name not in OPS:
            raise MpqError(f"the operation {name!r} has no form in ONNX here: export this model to another runtime")
        if self._rows and name in READS:
            values, made = self._read(eqn, values)
            if made is not None:
                return [made]
        if name == "dot_general" and (product := self._product(eqn, values)) is not None:
            return [product]
        inputs = [self._name(v, var) for v, var in zip(values, eqn.invars, strict=True)]
        made = OPS[name](self._graph, eqn, inputs)
        if not isinstance(made, str):
            return made
        self._reads.follow(eqn, inputs[0] if inputs else "", made)
        return [made]

    def _read(self, eqn: Any, values: list[Any]) -> tuple[list[Any], str | None]:
        """The operands of what may read a weight, the other one rounded as the plan says; or the whole product."""
        if (read := self._reads.next(values)) is None:
            return values, None
        spec, use, w = read
        if use.kind == "embedding" or (row := self._activations.of(use.input)) is None:
            return values, None
        name, var, qtensor = eqn.primitive.name, eqn.invars[1 - w], self._qtensors[spec.path]
        x, axes = Tensor(self._name(values[1 - w], var), shape_of(var), "float32"), feature_axes(eqn, 1 - w)
        if is_integer(row, spec, qtensor, use.kind):
            if name == "conv_general_dilated" and values[1] == Param(spec.param):
                convolve = functools.partial(convolution, self._graph, eqn)
                return values, self._activations.conv(row, x, axes[0], spec, qtensor, convolve)
            if name == "dot_general" and w == 1 and is_rows_product(eqn, values[1], spec):
                return values, self._activations.matmul(row, x, spec, qtensor)
        rounded = self._activations.rounded(row, x, axes)
        return [rounded, values[1]] if w == 1 else [values[0], rounded], None

    def _product(self, eqn: Any, values: list[Any]) -> str | None:
        """A matmul that reads the codes of a weight, where there is one."""
        x, w = values
        if not isinstance(w, Param) or isinstance(x, Param) or w.path not in self._specs:
            return None
        spec = self._specs[w.path]
        qtensor = self._qtensors[spec.path]
        if not nbits.is_matmul(spec, qtensor.scheme) or not is_rows_product(eqn, w, spec):
            return None
        operand = Tensor(self._name(x, eqn.invars[0]), shape_of(eqn.invars[0]), "float32")
        return nbits.matmul(self._graph, spec, qtensor, operand)

    def _name(self, value: Any, var: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, Param):
            array = self._array(value.path)
            array = self._graph.one("Transpose", array, perm=[1, 0]) if value.transposed else array
            self._reads.made(array, value.path)
            return array
        return self._graph.constant(np.asarray(value, dtype_of(var)))

    def _array(self, path: str) -> str:
        """A parameter as an array, made once."""
        if path not in self._arrays:
            if path in self._specs:
                spec = self._specs[path]
                self._arrays[path] = nbits.dequantized(self._graph, spec, self._qtensors[spec.path])
            else:
                value = self._params[path]
                stored = Stored(value.dtype.name, value.shape, value.nbytes, value.tobytes)
                name = self._graph.store(path, stored)
                self._arrays[path] = name if value.dtype == np.float32 else self._graph.one("Cast", name, to=1)
        return self._arrays[path]
