"""Primitives of JAX as nodes of ONNX, one function each; `OPS` is the table. Shapes may be symbolic."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mpq.export.jaxprs import dtype_of, product_equation, shape_of
from mpq.onnx.graph import TYPES, Graph
from mpq.types import MpqError

Op = Callable[[Graph, Any, list[str]], list[str] | str]
"""Graph, equation, names of its inputs -> names of its outputs."""

_LAST = np.iinfo(np.int64).max


def _same(kind: str, **attributes: Any) -> Op:
    return lambda graph, eqn, inputs: graph.one(kind, *inputs, **attributes)


def _constant_like(graph: Graph, eqn: Any, value: float) -> str:
    return graph.constant(value, dtype_of(eqn.invars[0]))


def _rsqrt(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Reciprocal", graph.one("Sqrt", *inputs))


def _erfc(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Sub", _constant_like(graph, eqn, 1), graph.one("Erf", *inputs))


def _ne(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Not", graph.one("Equal", *inputs))


def _integer_pow(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Pow", *inputs, _constant_like(graph, eqn, eqn.params["y"]))


def _select(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    if len(inputs) != 3 or dtype_of(eqn.invars[0]) != np.bool_:
        raise MpqError("a choice among more than two values has no form in ONNX here")
    return graph.one("Where", inputs[0], inputs[2], inputs[1])


def _cast(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Cast", *inputs, to=TYPES[np.dtype(eqn.params["new_dtype"]).name])


def _reshape(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Reshape", inputs[0], graph.shape(shape_of(eqn.outvars[0])))


def _transpose(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Transpose", *inputs, perm=[int(p) for p in eqn.params["permutation"]])


def _broadcast(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    given, shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    spread: list[Any] = [1] * len(shape)
    for size, axis in zip(given, eqn.params["broadcast_dimensions"], strict=True):
        spread[axis] = size
    placed = graph.one("Reshape", inputs[0], graph.shape(spread)) if tuple(spread) != given else inputs[0]
    return placed if tuple(spread) == shape else graph.one("Expand", placed, graph.shape(shape))


def _iota(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    shape, axis = shape_of(eqn.outvars[0]), eqn.params["dimension"]
    scalar = graph.one("Squeeze", graph.dim(shape[axis]), graph.constant([0], np.int64))
    counted = graph.one("Range", graph.constant(0, np.int64), scalar, graph.constant(1, np.int64))
    value = graph.one("Cast", counted, to=TYPES[dtype_of(eqn.outvars[0]).name])
    if len(shape) == 1:
        return value
    placed = graph.one("Reshape", value, graph.shape([s if i == axis else 1 for i, s in enumerate(shape)]))
    return graph.one("Expand", placed, graph.shape(shape))


def _dim_as_value(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    scalar = graph.one("Squeeze", graph.dim(eqn.params["dim"]), graph.constant([0], np.int64))
    return graph.one("Cast", scalar, to=TYPES[dtype_of(eqn.outvars[0]).name])


def _reduce(kind: str) -> Op:
    def emit(graph: Graph, eqn: Any, inputs: list[str]) -> str:
        return graph.one(kind, inputs[0], graph.constant(list(eqn.params["axes"]), np.int64), keepdims=0)

    return emit


def _concatenate(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Concat", *inputs, axis=int(eqn.params["dimension"]))


def _tile(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return graph.one("Tile", inputs[0], graph.shape(eqn.params["reps"]))


def _split(graph: Graph, eqn: Any, inputs: list[str]) -> list[str]:
    sizes, axis = eqn.params["sizes"], int(eqn.params["axis"])
    return graph.node("Split", [inputs[0], graph.shape(sizes)], len(sizes), axis=axis)


def _slice(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    shape, starts, ends = shape_of(eqn.invars[0]), eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(shape)
    ends = [_LAST if end == size else end for end, size in zip(ends, shape, strict=True)]
    axes = graph.constant(range(len(shape)), np.int64)
    return graph.one("Slice", inputs[0], graph.shape(starts), graph.shape(ends), axes, graph.shape(steps))


def _pad(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    config = [tuple(map(int, part)) for part in eqn.params["padding_config"]]
    if any(inside for _, _, inside in config):
        raise MpqError("padding between elements has no form in ONNX")
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    return graph.one("Pad", inputs[0], graph.constant(pads, np.int64), inputs[1])


def _gather(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    """A slice whose start is computed; or whole slices at indices of one axis or several."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (shape_of(v) for v in eqn.invars)
    axes, collapsed = tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)
    rest = [axis for axis in range(len(operand)) if axis not in axes]
    if numbers.operand_batching_dims or any(sizes[axis] != operand[axis] for axis in rest):
        raise MpqError("a gather of parts of slices has no form in ONNX here")
    if not collapsed and len(indices) == 1:
        starts = graph.one("Cast", inputs[1], to=TYPES["int64"])
        ends = graph.one("Add", starts, graph.shape([sizes[axis] for axis in axes]))
        return graph.one("Slice", inputs[0], starts, ends, graph.constant(axes, np.int64))
    if collapsed != axes or any(sizes[axis] != 1 for axis in axes):
        raise MpqError("a gather of parts of slices has no form in ONNX here")
    place = [axis for axis in range(len(indices) - 1 + len(rest)) if axis not in numbers.offset_dims]
    order = [*place, *numbers.offset_dims]
    if axes == (0,):
        rows = graph.one("Reshape", inputs[1], graph.shape(indices[:-1]))
        values = graph.one("Gather", inputs[0], rows, axis=0)
    else:
        first = graph.one("Transpose", inputs[0], perm=[*axes, *rest])
        values = graph.one("GatherND", first, graph.one("Cast", inputs[1], to=TYPES["int64"]))
    if order == sorted(order):
        return values
    return graph.one("Transpose", values, perm=[int(axis) for axis in np.argsort(order)])


def _top_k(graph: Graph, eqn: Any, inputs: list[str]) -> list[str]:
    values, indices = graph.node("TopK", [inputs[0], graph.dim(eqn.params["k"])], 2, axis=-1)
    return [values, graph.one("Cast", indices, to=TYPES[dtype_of(eqn.outvars[1]).name])]


def einsum(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    """`dot_general` of any kind."""
    equation = product_equation(eqn)
    return graph.one("MatMul", *inputs) if equation is None else graph.one("Einsum", *inputs, equation=equation)


def convolution(
    graph: Graph,
    eqn: Any,
    kind: str,
    inputs: list[str],
    more: Sequence[str] = (),
    done: Callable[[str], str] = lambda made: made,
) -> str:
    """A convolution.

    Args:
      graph: to add to.
      eqn: the equation.
      kind: `Conv`, or another operation with its attributes.
      inputs: the value and the kernel, laid out as the equation has them.
      more: inputs of the operation beside them.
      done: to its result, which is `[batch, channels, ...]`.
    """
    p = eqn.params
    numbers, spatial = p["dimension_numbers"], len(p["window_strides"])
    if p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]):
        raise MpqError("a transposed convolution has no form in ONNX here")
    x = graph.one("Transpose", inputs[0], perm=list(numbers.lhs_spec))
    w = graph.one("Transpose", inputs[1], perm=list(numbers.rhs_spec))
    pads = [int(low) for low, _ in p["padding"]] + [int(high) for _, high in p["padding"]]
    made = graph.one(
        kind,
        x,
        w,
        *more,
        strides=list(p["window_strides"]),
        dilations=list(p["rhs_dilation"]),
        pads=pads,
        group=p["feature_group_count"],
        kernel_shape=[int(shape_of(eqn.invars[1])[axis]) for axis in numbers.rhs_spec[2 : 2 + spatial]],
    )
    return graph.one("Transpose", done(made), perm=[int(axis) for axis in np.argsort(numbers.out_spec)])


def _conv(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    return convolution(graph, eqn, "Conv", inputs)


def _max_pool(graph: Graph, eqn: Any, inputs: list[str]) -> str:
    """Over the middle axes of `[batch, height, width, channels]`."""
    p = eqn.params
    window, strides, padding = (list(p[k]) for k in ("window_dimensions", "window_strides", "padding"))
    outer = [(window[i], strides[i], *padding[i]) for i in (0, len(window) - 1)]
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    if len(window) != 4 or dilated or any(o != (1, 1, 0, 0) for o in outer):
        raise MpqError("a window over batch or channels has no form in ONNX here")
    pads = [int(low) for low, _ in padding[1:3]] + [int(high) for _, high in padding[1:3]]
    x = graph.one("Transpose", inputs[0], perm=[0, 3, 1, 2])
    made = graph.one("MaxPool", x, kernel_shape=window[1:3], strides=strides[1:3], pads=pads)
    return graph.one("Transpose", made, perm=[0, 2, 3, 1])


OPS: Mapping[str, Op] = MappingProxyType(
    {
        **{
            name: _same(kind)
            for name, kind in {
                "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "neg": "Neg",
                "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh",
                "erf": "Erf", "logistic": "Sigmoid", "floor": "Floor", "sign": "Sign", "and": "And", "or": "Or",
                "not": "Not", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual",
                "pow": "Pow",
            }.items()
        },
        "square": lambda graph, eqn, inputs: graph.one("Mul", inputs[0], inputs[0]),
        "rsqrt": _rsqrt,
        "erfc": _erfc,
        "ne": _ne,
        "integer_pow": _integer_pow,
        "select_n": _select,
        "convert_element_type": _cast,
        "reshape": _reshape,
        "squeeze": _reshape,
        "expand_dims": _reshape,
        "transpose": _transpose,
        "broadcast_in_dim": _broadcast,
        "iota": _iota,
        "dim_as_value": _dim_as_value,
        "reduce_sum": _reduce("ReduceSum"),
        "reduce_max": _reduce("ReduceMax"),
        "reduce_min": _reduce("ReduceMin"),
        "concatenate": _concatenate,
        "tile": _tile,
        "split": _split,
        "slice": _slice,
        "pad": _pad,
        "gather": _gather,
        "top_k": _top_k,
        "dot_general": einsum,
        "conv_general_dilated": _conv,
        "reduce_window_max": _max_pool,
    }
)  # fmt: skip
"""Primitive -> what emits it."""
