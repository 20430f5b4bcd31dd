"""Walks the jaxpr of a model, traced once for every batch, and emits a LiteRT graph.

A weight that a matmul, a convolution or an embedding reads is stored as that wants it; anywhere else it is dequantized
and read as any other array. What depends on constants alone is computed here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from mpq.export.graphs import is_rows_product
from mpq.export.jaxprs import Known, Param, dtype_of, shape_of, trace_open, walk
from mpq.inputs import Tokens
from mpq.litert.activations import TENSOR, TOKEN, Codes, Rounded
from mpq.litert.affine import NONE, RELU, Affine, Sum, affine
from mpq.litert.call import Call, broadcast, merged
from mpq.litert.graph import Content, Graph, Quantization
from mpq.litert.ops import OPS
from mpq.litert.weights import Weights, folds, has_integer, has_table, parameter
from mpq.litert.windows import padded
from mpq.models import Model
from mpq.types import MpqError, QTensor, WeightSpec

WINDOW = 512
"""Tokens of a text model's input where a longer context allows more and nothing else is asked."""
_FOLDED = 2**14  # elements of a constant that is computed here and not in the graph
_KNOWN = 2**12  # elements of a parameter that is taken as a constant: norms and biases
_FEW = (
    8  # positions for which multiplying by an array that the delegate has not seen before costs more than its product
)


def traced(model: Model, window: int | None) -> tuple[Any, tuple[Any, ...], str]:
    """The jaxpr of a model for any batch; shape and dtype name of its input.

    Args:
      model: with shapes for parameters.
      window: tokens of text; None: the whole context, but at most `WINDOW`.

    Raises:
      MpqError: the function depends on the batch otherwise than by its size, or the window is too long.
    """
    inputs = model.inputs
    if isinstance(inputs, Tokens):
        window = min(inputs.context, WINDOW) if window is None else window
        if not 2 <= window <= inputs.context:
            raise MpqError(f"a window of {window} tokens: the model reads 2 to {inputs.context}")
    struct = inputs.struct(1, window)
    shape = (*export.symbolic_shape("batch", constraints=["batch >= 1"]), *struct.shape[1:])
    opened = jax.ShapeDtypeStruct(shape, struct.dtype)
    closed = trace_open(model.apply, model.params, [opened], "batches, which one graph cannot")
    return closed, shape, struct.dtype.name


@dataclasses.dataclass(frozen=True)
class Int8:
    """A value that is rounded: an int8 tensor, and how it is read."""

    tensor: int
    codes: Codes


class Converter:
    """One conversion."""

    def __init__(
        self,
        graph: Graph,
        specs: Mapping[str, WeightSpec],
        qtensors: Mapping[str, QTensor],
        params: Mapping[str, np.ndarray],
        rounded: Rounded,
        apart: Collection[int] = (),
    ) -> None:
        """Prepare.

        Args:
          graph: to add to.
          specs: parameter path -> the weight that it is.
          qtensors: weight path -> quantized weight.
          params: every other parameter, in the dtype that it is stored in.
          rounded: the inputs that the plan rounds.
          apart: `read` of a conversion of the same before: these are computed in float32 and rounded for some readers.
        """
        self._graph, self._specs, self._params, self._rounded = graph, specs, params, rounded
        self._weights = Weights(graph, qtensors)
        self._arrays: dict[str, int] = {}
        self._codes: dict[Any, tuple[Any, Int8]] = {}
        self._apart, self._numbers = apart, dict[int, tuple[Any, int]]()
        self.read: set[int] = set()
        """Numbers of values that are rounded for some readers and read by others, for whom the plan does not round."""
        self.biases: dict[str, np.ndarray] = {}
        """Path of a parameter -> what an integer convolution that adds it has it grow by, `float64[channels]`."""

    def run(self, closed: Any, paths: list[str], shape: tuple[Any, ...], dtype: str, name: str) -> tuple[int, int]:
        """Emit the whole function; numbers of its input and output.

        Args:
          closed: its jaxpr, whose first arguments are the parameters in the order of `paths`.
          paths: of the parameters.
          shape: of the input.
          dtype: of the input.
          name: of the input.
        """
        x = self._graph.tensor(name, shape, dtype)
        (result,) = walk(closed.jaxpr, closed.consts, [*map(self._parameter, paths), x], self._emit, folded=_FOLDED)
        return x, self._full(result, closed.jaxpr.outvars[0])

    def _parameter(self, path: str) -> Any:
        """A small one by its values, so that what a norm makes of it is computed here."""
        value = self._params.get(path)
        if path in self._specs or value is None or value.size > _KNOWN:
            return Param(path)
        return Known.of(value.astype(np.float32), path)

    def _emit(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if (made := affine(eqn, values)) is not None or (made := self._in_codes(eqn, values)) is not None:
            return [made]
        special = {"dot_general": self._product, "gather": self._embedding, "conv_general_dilated": self._conv}.get(
            name
        )
        if special is not None and (made := special(eqn, values)) is not None:
            return [made]
        if name not in OPS:
            raise MpqError(f"the operation {name!r} has no form in LiteRT here: export this model to another runtime")
        call = Call(self._graph, eqn, [self._value(v, var) for v, var in zip(values, eqn.invars, strict=True)])
        found = OPS[name](call)
        return [found] if isinstance(found, int) else found

    def _product(self, eqn: Any, values: list[Any]) -> Affine | None:
        """A matmul with a quantized weight, where there is one."""
        (x, w), shape = values, shape_of(eqn.invars[0])
        if not isinstance(w, Param) or isinstance(x, Param) or w.path not in self._specs:
            return None
        spec = self._specs[w.path]
        if spec.batch != 1 or spec.factors or not is_rows_product(eqn, w, spec):
            return None
        call = Call(self._graph, eqn, [])
        codes = self._rounded.static.get(spec.path)
        x = self._full(x, eqn.invars[0]) if codes is None else self._float(self._round(x, eqn.invars[0], codes), shape)
        rows = call.reshaped(x, [merged(shape[:-1]), spec.k], "float32")
        return Affine.of(spec.n, lambda a, out: self._rows_product(call, rows, spec, a.scale, a.shift, a.act))

    def _rows_product(self, call: Call, x: int, spec: WeightSpec, scale: Any, shift: Any, act: int) -> int:
        scheme, out = self._weights.scheme(spec), [merged(call.shape[:-1]), spec.n]
        known = merged([d for d in call.shape[:-1] if isinstance(d, int)])
        hybrid = spec.path in self._rounded.hybrid
        if hybrid and self._rounded.hybrid[spec.path] == TENSOR and known != 1:
            raise MpqError(f"the input of {spec.path} is rounded token by token in LiteRT: quantize with {TOKEN}")
        codes = self._weights.hybrid(spec) if hybrid else None
        if codes is not None or folds(scheme) or known < _FEW:
            w, turn = codes or (self._weights.values(spec), 1.0)
            scale = scale * turn
            bias, rest = self._bias(scale, shift)
            options: dict[str, Any] = {"keepNumDims": False, "asymmetricQuantizeInputs": codes is not None}
            options["fusedActivationFunction"] = NONE if rest else act
            made = call.one("FULLY_CONNECTED", x, w, bias, shape=out, **options)
        else:
            rest, options = True, dict[str, Any](adjX=False, adjY=True, options="BatchMatMulOptions")
            made = call.one("BATCH_MATMUL", x, self._weights.values(spec), shape=out, **options)
        return call.reshaped(self._finish(call, made, out, scale, shift, act) if rest else made, call.shape)

    def _embedding(self, eqn: Any, values: list[Any]) -> int | None:
        """Rows of a quantized table, where this is that."""
        w, at = values
        numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
        if not isinstance(w, Param) or w.transposed or w.path not in self._specs:
            return None
        spec, rows = self._specs[w.path], shape_of(eqn.invars[1])
        first = tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        last = tuple(numbers.offset_dims) == (len(rows) - 1,) and tuple(eqn.params["slice_sizes"]) == (1, shape[-1])
        if len(shape) != 2 or spec.permutation != (1, 0) or not first or not last:
            return None
        call = Call(self._graph, eqn, [])
        indices = call.reshaped(self._full(at, eqn.invars[1]), [merged(rows)], "int32")
        table = self._weights.codes(spec) if has_table(self._weights.scheme(spec)) else self._weights.values(spec)
        made = call.one("EMBEDDING_LOOKUP", indices, table, shape=[merged(rows), shape[1]])
        return call.reshaped(made, call.shape)

    def _conv(self, eqn: Any, values: list[Any]) -> Affine:
        p = eqn.params
        numbers, rank = p["dimension_numbers"], len(shape_of(eqn.invars[0]))
        last = (0, rank - 1, *range(1, rank - 1))
        if rank != 4 or p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]):
            raise MpqError("a transposed convolution, or one of one or three dimensions, has no form in LiteRT here")
        if tuple(numbers.lhs_spec) != last or tuple(numbers.out_spec) != last:
            raise MpqError("a convolution whose channels are not last has no form in LiteRT here")
        outputs, w = shape_of(eqn.invars[1])[numbers.rhs_spec[0]], values[1]
        path = self._specs[w.path].path if isinstance(w, Param) and w.path in self._specs else ""
        if (codes := self._rounded.static.get(path)) is None:
            x = self._full(values[0], eqn.invars[0])
            return Affine.of(outputs, lambda a, out: self._convolved(eqn, x, w, a.scale, a.shift, a.act))
        rounded = self._round(values[0], eqn.invars[0], codes)
        make = lambda a, out: self._convolved_codes(eqn, rounded, w, a, out)
        spec = self._specs[path]
        integer = has_integer(spec, self._weights.scheme(spec), self._rounded.sums)
        return Affine.of(outputs, make, integer)

    def _convolved(self, eqn: Any, x: int, w: Any, scale: Any, shift: Any, act: int) -> int:
        call, (layout, ohwi, deep) = Call(self._graph, eqn, []), _kernel(eqn)
        path = self._specs[w.path].path if isinstance(w, Param) and w.path in self._specs else ""
        codes = self._weights.hybrid(self._specs[w.path], ohwi) if path in self._rounded.hybrid else None
        if codes is not None:
            kernel, turn = codes
            scale = scale * turn
        else:
            kernel = self._filter(w, eqn.invars[1], layout, ohwi)
        x, options = _window(call, x, eqn)
        bias, rest = self._bias(scale, shift)
        bias = self._graph.constant(np.zeros(ohwi[0], np.float32)) if bias < 0 else bias
        options["fusedActivationFunction"] = NONE if rest else act
        if deep:
            hwo, order = [*ohwi[1:3], ohwi[0]], self._graph.constant([1, 2, 0], np.int32)
            turned = call.one("TRANSPOSE", call.reshaped(kernel, ohwi[:3], "float32"), order, shape=hwo)
            kernel = call.reshaped(turned, [1, *hwo])
        made = call.one("DEPTHWISE_CONV_2D" if deep else "CONV_2D", x, kernel, bias, **options)
        return self._finish(call, made, call.shape, scale, shift, act) if rest else made

    def _convolved_codes(self, eqn: Any, x: Int8, w: Param, a: Affine, out: Codes | None) -> int:
        """The convolution of a rounded input: in integers where its output is rounded too, and codes allow it."""
        spec, (_, ohwi, deep) = self._specs[w.path], _kernel(eqn)
        shape, axis = ([1, *ohwi[1:3], ohwi[0]], 3) if deep else (ohwi, 0)
        kernel = None if out is None else self._weights.integer(spec, shape, axis, a.scale)
        if out is None or kernel is None:
            made = self._convolved(eqn, self._float(x, shape_of(eqn.invars[0])), w, a.scale, a.shift, a.act)
            return made if out is None else self._quantize(made, shape_of(eqn.outvars[0]), out).tensor
        steps = np.asarray(self._graph.tensors[kernel].quantization.scale, np.float64) * x.codes.scale
        bias = np.clip(np.round(a.shift / steps), -(2**31), 2**31 - 1).astype(np.int32)
        if a.bias is not None:
            path, gain = a.bias
            self.biases.setdefault(path, np.divide(bias * steps - a.shift, gain, np.zeros_like(gain), where=gain != 0))
        content = Content(bias.nbytes, bias.tobytes)
        number = self._graph.tensor(f"{spec.path}.bias", bias.shape, "int32", content, Quantization(steps))
        inner = Call(self._graph, eqn, [], x.codes.quantization)
        given, options = _window(inner, x.tensor, eqn)
        options["fusedActivationFunction"] = a.act
        call = dataclasses.replace(inner, codes=out.quantization)
        return call.one("DEPTHWISE_CONV_2D" if deep else "CONV_2D", given, kernel, number, **options)

    def _in_codes(self, eqn: Any, values: list[Any]) -> Any:
        """What an equation makes of rounded values without reading them; else None."""
        name, first = eqn.primitive.name, values[0] if values else None
        if name == "add" and self._rounded.sums:
            for product, other in (values, values[::-1]):
                ready = isinstance(product, Affine) and product.integer and product.act == NONE
                if ready and (known := self._known(other)) is not None:
                    return Sum(product, known.tensor, known.codes, shape_of(eqn.outvars[0]))
        if name == "max" and isinstance(first, Sum) and first.act == NONE and not np.any(values[1]):
            return dataclasses.replace(first, act=RELU)
        if not self._rounded.sums:
            return None
        zero = name == "pad" and isinstance(values[1], np.ndarray) and not values[1].any()
        if (name in ("slice", "reshape", "transpose") or zero) and (known := self._known(first)) is not None:
            made = OPS[name](Call(self._graph, eqn, [known.tensor], known.codes.quantization))
            assert isinstance(made, int)
            return Int8(made, known.codes)
        return None

    def _known(self, value: Any) -> Int8 | None:
        """The int8 tensor of a value, where it has one."""
        if isinstance(value, Int8):
            return value
        return self._codes[id(value)][1] if isinstance(value, Affine | Sum) and id(value) in self._codes else None

    def _round(self, value: Any, var: Any, codes: Codes) -> Int8:
        """A value as an int8 tensor, made of integers where that is possible."""
        if (known := self._known(value)) is not None and known.codes == codes:
            return known
        number = self._numbers.setdefault(id(value), (value, len(self._numbers)))[1]
        if number in self._apart:
            return self._quantize(self._full(value, var), shape_of(var), codes)
        if isinstance(value, Affine) and value.integer and known is None:
            made = Int8(value.emit(codes), codes)
        elif isinstance(value, Sum) and known is None:
            inner = Codes.beside(value.codes, codes, value.act == RELU)
            inputs, options = [value.product.emit(inner), value.other], {"fusedActivationFunction": value.act}
            total = self._graph.op("ADD", inputs, value.shape, "int8", codes.quantization, **options)
            made = Int8(total, codes)
        else:
            return self._quantize(self._full(value, var), shape_of(var), codes)
        self._codes[id(value)] = value, made
        return made

    def _quantize(self, value: int, shape: Any, codes: Codes) -> Int8:
        return Int8(self._graph.op("QUANTIZE", [value], shape, "int8", codes.quantization), codes)

    def _float(self, value: Int8, shape: Any) -> int:
        return self._graph.op("DEQUANTIZE", [value.tensor], shape, "float32")

    def _bias(self, scale: np.ndarray, shift: np.ndarray) -> tuple[int, bool]:
        """Bias of an operator, -1 for none, and whether its output has to be scaled and shifted instead."""
        if (scale != 1).any():
            return -1, True
        return (-1 if not shift.any() else self._graph.constant(shift, np.float32)), False

    def _finish(self, call: Call, value: int, shape: Any, scale: Any, shift: Any, act: int) -> int:
        """`act(value * scale + shift)`, channels last."""
        if (scale != 1).any():
            factor, last = self._graph.constant(scale, np.float32), not shift.any()
            value = call.one("MUL", value, factor, shape=shape, fusedActivationFunction=act if last else NONE)
            if last:
                return value
        if not shift.any() and act == NONE:
            return value
        return call.one("ADD", value, self._graph.constant(shift, np.float32), shape=shape, fusedActivationFunction=act)

    def _filter(self, value: Any, var: Any, layout: Any, ohwi: list[int]) -> int:
        """The kernel of a convolution as `[outputs, height, width, inputs]`."""
        if isinstance(value, Param) and value.path in self._specs and not value.transposed:
            spec = self._specs[value.path]
            order = [layout[2], layout[3], layout[1], layout[0]]  # height, width, inputs, outputs
            if spec.batch == 1 and not spec.factors and list(spec.permutation) == order:
                return self._weights.values(spec, ohwi)
        order = [layout[0], layout[2], layout[3], layout[1]]
        array, moved = self._value(value, var), [shape_of(var)[axis] for axis in order]
        return self._graph.op("TRANSPOSE", [array, self._graph.constant(order, np.int32)], moved, "float32")

    def _full(self, value: Any, var: Any) -> int:
        """The value with its whole shape."""
        return broadcast(self._graph, self._value(value, var), shape_of(var), dtype_of(var).name)

    def _value(self, value: Any, var: Any) -> int:
        if isinstance(value, int):
            return value
        if (known := self._known(value)) is not None:
            self.read.add(self._numbers[id(value)][1] if id(value) in self._numbers else -1)
            return self._float(known, shape_of(var))
        if isinstance(value, Affine):
            return value.emit()
        if isinstance(value, Sum):
            inputs = [value.product.emit(), self._float(Int8(value.other, value.codes), value.shape)]
            return self._graph.op("ADD", inputs, value.shape, "float32", fusedActivationFunction=value.act)
        if isinstance(value, Param):
            array = self._array(value.path)
            if not value.transposed:
                return array
            order = self._graph.constant([1, 0], np.int32)
            return self._graph.op("TRANSPOSE", [array, order], shape_of(var), "float32")
        return self._graph.constant(np.asarray(value, dtype_of(var)))

    def _array(self, path: str) -> int:
        """A parameter as an array, made once."""
        if path not in self._arrays:
            if path in self._specs:
                spec = self._specs[path]
                self._arrays[path] = parameter(self._graph, spec, self._weights.values(spec))
            else:
                value = self._params[path]
                name = self._graph.tensor(path, value.shape, value.dtype.name, Content(value.nbytes, value.tobytes))
                self._arrays[path] = self._weights.as_float(name, value.dtype.name, value.shape)
        return self._arrays[path]


def _kernel(eqn: Any) -> tuple[Any, list[int], bool]:
    """Layout of a kernel, its shape as `[outputs, height, width, inputs]`, and whether each channel has its own."""
    layout = eqn.params["dimension_numbers"].rhs_spec
    outputs, inputs, height, width = (shape_of(eqn.invars[1])[axis] for axis in layout)
    groups = eqn.params["feature_group_count"]
    return layout, [outputs, height, width, inputs], inputs == 1 and groups == shape_of(eqn.invars[0])[3] and groups > 1


def _window(call: Call, x: int, eqn: Any) -> tuple[int, dict[str, Any]]:
    """Input and options of a convolution."""
    p, (_, ohwi, deep) = eqn.params, _kernel(eqn)
    (stride_h, stride_w), (dilation_h, dilation_w) = p["window_strides"], p["rhs_dilation"]
    how = [(ohwi[1], stride_h, dilation_h), (ohwi[2], stride_w, dilation_w)]
    pads = [(int(low), int(high)) for low, high in p["padding"]]
    x, padding = padded(call, x, shape_of(eqn.invars[0]), pads, how, None)
    options: dict[str, Any] = {"padding": padding, "strideH": stride_h, "strideW": stride_w}
    options |= {"dilationHFactor": dilation_h, "dilationWFactor": dilation_w}
    if not deep:
        return x, options | {"options": "Conv2DOptions"}
    return x, options | {"depthMultiplier": ohwi[0] // p["feature_group_count"], "options": "DepthwiseConv2DOptions"}
