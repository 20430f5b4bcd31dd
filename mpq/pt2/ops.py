"""Primitives of JAX as functions of PyTorch, one function each; `OPS` is the table. Shapes may be symbolic."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mpq.export.jaxprs import dtype_of, product_equation, shape_of
from mpq.pt2.graph import Graph
from mpq.types import MpqError

Op = Callable[[Graph, Any, list[Any]], Any]
"""Graph, equation, nodes of its inputs -> node of its output, or a list of them."""


def _same(name: str) -> Op:
    return lambda graph, eqn, inputs: graph.one(getattr(graph.torch, name), *inputs)


def _operator(function: Callable[..., Any]) -> Op:
    return lambda graph, eqn, inputs: graph.one(function, *inputs)


def _div(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    mode = "trunc" if np.issubdtype(dtype_of(eqn.outvars[0]), np.integer) else None
    return graph.one(graph.torch.div, *inputs, rounding_mode=mode)


def _integer_pow(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return graph.one(operator.pow, inputs[0], int(eqn.params["y"]))


def _select(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    if len(inputs) != 3 or dtype_of(eqn.invars[0]) != np.bool_:
        raise MpqError("a choice among more than two values has no form in PyTorch here")
    return graph.one(graph.torch.where, inputs[0], inputs[2], inputs[1])


def _cast(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return graph.cast(inputs[0], np.dtype(eqn.params["new_dtype"]).name)


def _reshape(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return graph.one(graph.torch.reshape, inputs[0], graph.shape(shape_of(eqn.outvars[0])))


def _transpose(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return permuted(graph, inputs[0], eqn.params["permutation"])


def permuted(graph: Graph, value: Any, order: Iterable[Any]) -> Any:
    """`value` with its axes in another order."""
    order = [int(axis) for axis in order]
    return value if order == sorted(order) else graph.one(graph.torch.permute, value, order)


def _broadcast(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    given, shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    spread: list[Any] = [1] * len(shape)
    for size, axis in zip(given, eqn.params["broadcast_dimensions"], strict=True):
        spread[axis] = size
    value = inputs[0]
    if tuple(spread) != given:
        value = graph.one(graph.torch.reshape, value, graph.shape(spread))
    return value if tuple(spread) == shape else expanded(graph, value, shape)


def expanded(graph: Graph, value: Any, shape: Sequence[Any]) -> Any:
    """`value`, with 1 where it is broadcast, in a shape."""
    return graph.one(graph.torch.broadcast_to, value, graph.shape(shape))


def _iota(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    shape, axis = shape_of(eqn.outvars[0]), eqn.params["dimension"]
    dtype = graph.dtype(dtype_of(eqn.outvars[0]).name)
    value = graph.one(graph.torch.arange, graph.dim(shape[axis]), dtype=dtype)
    if len(shape) == 1:
        return value
    placed = graph.one(graph.torch.reshape, value, graph.shape([s if i == axis else 1 for i, s in enumerate(shape)]))
    return expanded(graph, placed, shape)


def _dim_as_value(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    dtype = graph.dtype(dtype_of(eqn.outvars[0]).name)
    return graph.one(graph.torch.full, (), graph.dim(eqn.params["dim"]), dtype=dtype)


def _reduce(name: str) -> Op:
    return lambda graph, eqn, inputs: graph.one(getattr(graph.torch, name), inputs[0], dim=list(eqn.params["axes"]))


def _concatenate(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return graph.one(graph.torch.cat, inputs, dim=int(eqn.params["dimension"]))


def _tile(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    return graph.one(graph.torch.tile, inputs[0], graph.shape(eqn.params["reps"]))


def _split(graph: Graph, eqn: Any, inputs: list[Any]) -> list[Any]:
    sizes = eqn.params["sizes"]
    parts = graph.one(graph.torch.split, inputs[0], graph.shape(sizes), dim=int(eqn.params["axis"]))
    return [graph.one(operator.getitem, parts, i) for i in range(len(sizes))]


def _slice(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    shape, starts, ends = shape_of(eqn.invars[0]), eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(shape)
    parts = [
        slice(None) if (start, end, step) == (0, size, 1) else slice(graph.dim(start), graph.dim(end), int(step))
        for start, end, step, size in zip(starts, ends, steps, shape, strict=True)
    ]
    return graph.one(operator.getitem, inputs[0], tuple(parts))


def _pad(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    config = [tuple(map(int, part)) for part in eqn.params["padding_config"]]
    if any(inside for _, _, inside in config) or inputs[1] not in graph.known:
        raise MpqError("padding between elements, or by what is computed, has no form in PyTorch here")
    return _padded(graph, inputs[0], [(low, high) for low, high, _ in config], graph.known[inputs[1]].item())


def _padded(graph: Graph, value: Any, pads: Sequence[tuple[int, int]], fill: Any) -> Any:
    """`value` with so many elements before and behind it along each of its last axes."""
    flat = [size for pair in reversed(pads) for size in pair]
    return graph.one(graph.torch.nn.functional.pad, value, flat, value=fill) if any(flat) else value


def _gather(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    """A slice whose start is computed; or whole slices at indices of one axis or several."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (shape_of(v) for v in eqn.invars)
    axes, collapsed = tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)
    rest = [axis for axis in range(len(operand)) if axis not in axes]
    if numbers.operand_batching_dims or any(sizes[axis] != operand[axis] for axis in rest):
        raise MpqError("a gather of parts of slices has no form in PyTorch here")
    at = lambda i: graph.one(operator.getitem, inputs[1], (Ellipsis, i))
    if not collapsed and len(indices) == 1:
        value = inputs[0]
        for i, axis in enumerate(axes):
            counted = graph.one(graph.torch.arange, graph.dim(sizes[axis]))
            value = graph.one(graph.torch.index_select, value, axis, graph.one(operator.add, counted, at(i)))
        return value
    if collapsed != axes or any(sizes[axis] != 1 for axis in axes):
        raise MpqError("a gather of parts of slices has no form in PyTorch here")
    place = [axis for axis in range(len(indices) - 1 + len(rest)) if axis not in numbers.offset_dims]
    if axes == (0,) and len(operand) == 2:
        values = graph.one(graph.torch.nn.functional.embedding, at(0), inputs[0])
    else:
        first = permuted(graph, inputs[0], [*axes, *rest])
        values = graph.one(graph.torch.ops.aten.index.Tensor, first, [at(i) for i in range(len(axes))])
    return permuted(graph, values, np.argsort([*place, *numbers.offset_dims]))


def _top_k(graph: Graph, eqn: Any, inputs: list[Any]) -> list[Any]:
    found = graph.one(graph.torch.topk, inputs[0], graph.dim(eqn.params["k"]))
    values, indices = (graph.one(operator.getitem, found, i) for i in range(2))
    return [values, graph.cast(indices, dtype_of(eqn.outvars[1]).name)]


def _dot_general(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    equation = product_equation(eqn)
    if equation is None:
        return graph.one(graph.torch.matmul, *inputs)
    return graph.one(graph.torch.einsum, equation, *inputs)


def convolution(graph: Graph, eqn: Any, x: Any, w: Any) -> Any:
    """Of `x[batch, channels, ...]` with `w[outputs, inputs, ...]`, laid out as the equation has its result."""
    p = eqn.params
    numbers, spatial = p["dimension_numbers"], len(p["window_strides"])
    if p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]) or not 1 <= spatial <= 3:
        raise MpqError("a transposed convolution, or one of more than three dimensions, has no form in PyTorch here")
    pads = [(int(low), int(high)) for low, high in p["padding"]]
    even = all(low == high >= 0 for low, high in pads)
    made = graph.one(
        getattr(graph.torch, f"conv{spatial}d"),
        x if even else _padded(graph, x, pads, 0.0),
        w,
        stride=list(p["window_strides"]),
        padding=[low for low, _ in pads] if even else 0,
        dilation=list(p["rhs_dilation"]),
        groups=p["feature_group_count"],
    )
    return permuted(graph, made, np.argsort(numbers.out_spec))


def _conv(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    numbers = eqn.params["dimension_numbers"]
    return convolution(
        graph, eqn, permuted(graph, inputs[0], numbers.lhs_spec), permuted(graph, inputs[1], numbers.rhs_spec)
    )


def _max_pool(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    """Over the middle axes of `[batch, height, width, channels]`."""
    p = eqn.params
    window, strides, padding = (list(p[k]) for k in ("window_dimensions", "window_strides", "padding"))
    outer = [(window[i], strides[i], *padding[i]) for i in (0, len(window) - 1)]
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    if len(window) != 4 or dilated or any(o != (1, 1, 0, 0) for o in outer):
        raise MpqError("a window over batch or channels has no form in PyTorch here")
    pads = [(int(low), int(high)) for low, high in padding[1:3]]
    x = _padded(graph, permuted(graph, inputs[0], [0, 3, 1, 2]), pads, -np.inf)
    return permuted(graph, graph.one(graph.torch.max_pool2d, x, window[1:3], strides[1:3]), [0, 2, 3, 1])


def _largest(graph: Graph, eqn: Any, inputs: list[Any]) -> Any:
    """A rectifier by its name, which those who fuse it into a convolution look for."""
    if inputs[1] in graph.known and not graph.known[inputs[1]].any():
        return graph.one(graph.torch.relu, inputs[0])
    return graph.one(graph.torch.maximum, *inputs)


OPS: Mapping[str, Op] = MappingProxyType(
    {
        **{
            name: _same(kind)
            for name, kind in {
                "min": "minimum", "neg": "neg", "abs": "abs", "exp": "exp", "log": "log", "sqrt": "sqrt", "sin": "sin",
                "cos": "cos", "tanh": "tanh", "erf": "erf", "erfc": "erfc", "rsqrt": "rsqrt", "logistic": "sigmoid",
                "floor": "floor", "sign": "sign", "and": "bitwise_and", "or": "bitwise_or", "not": "bitwise_not",
                "eq": "eq", "ne": "ne", "lt": "lt", "gt": "gt", "le": "le", "ge": "ge", "pow": "pow",
                "square": "square",
            }.items()
        },
        "add": _operator(operator.add),
        "sub": _operator(operator.sub),
        "mul": _operator(operator.mul),
        "div": _div,
        "max": _largest,
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
        "reduce_sum": _reduce("sum"),
        "reduce_max": _reduce("amax"),
        "reduce_min": _reduce("amin"),
        "concatenate": _concatenate,
        "tile": _tile,
        "split": _split,
        "slice": _slice,
        "pad": _pad,
        "gather": _gather,
        "top_k": _top_k,
        "dot_general": _dot_general,
        "conv_general_dilated": _conv,
        "reduce_window_max": _max_pool,
    }
)  # fmt: skip
"""Primitive -> what emits it."""
