"""Primitives of JAX as operators of LiteRT, one function each; `OPS` is the table."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mpq.export.jaxprs import dtype_of, shape_of
from mpq.litert.call import NONE_ACTIVATION, Call, elementwise, like, open_dims, placed
from mpq.litert.windows import max_pool
from mpq.types import MpqError

Op = Callable[[Call], int | list[int]]


def _same(kind: str, **options: Any) -> Op:
    return lambda call: elementwise(call, kind, *call.inputs, **options)


def _integer_pow(call: Call) -> int:
    power, (x,) = call.eqn.params["y"], call.inputs
    value = x
    for _ in range(abs(power) - 1):
        value = elementwise(call, "MUL", value, x, **NONE_ACTIVATION)
    if power > 0:
        return value
    return elementwise(call, "DIV", like(call, 1), value, **NONE_ACTIVATION)


# erf(x) = x P(x^2) / Q(x^2) on |x| <= 3.832506856900711, beyond which it is 1 in float32; coefficients of Eigen's and
# XLA's float32 error function, highest power first.
_ERF_LIMIT = 3.832506856900711
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-07, 2.3547966471313185e-05, 0.0010179625278914885, 0.014070470171167667, 0.11098505178285362,
    0.49746925110067538, 1.0,
)  # fmt: skip


def _erf(call: Call) -> int:
    x = elementwise(call, "MAXIMUM", call.inputs[0], like(call, -_ERF_LIMIT))
    x = elementwise(call, "MINIMUM", x, like(call, _ERF_LIMIT))
    square = elementwise(call, "MUL", x, x, **NONE_ACTIVATION)

    def polynomial(coefficients: Sequence[float]) -> int:
        value = like(call, coefficients[0])
        for c in coefficients[1:]:
            value = elementwise(call, "MUL", value, square, **NONE_ACTIVATION)
            value = elementwise(call, "ADD", value, like(call, c), **NONE_ACTIVATION)
        return value

    top = elementwise(call, "MUL", x, polynomial(_ERF_P), **NONE_ACTIVATION)
    return elementwise(call, "DIV", top, polynomial(_ERF_Q), **NONE_ACTIVATION)


def _erfc(call: Call) -> int:
    return elementwise(call, "SUB", like(call, 1), _erf(call), **NONE_ACTIVATION)


def _select(call: Call) -> int:
    if len(call.inputs) != 3 or dtype_of(call.eqn.invars[0]) != np.bool_:
        raise MpqError("a choice among more than two values has no form in LiteRT here")
    which, no, yes = call.inputs
    if not shape_of(call.eqn.invars[0]):
        which = call.reshaped(which, [1] * len(call.shape), "bool")
    return elementwise(call, "SELECT_V2", which, yes, no, options="SelectV2Options")


def _cast(call: Call) -> int:
    shape = placed(call.shape, call.graph.shape_of(call.inputs[0]))
    return call.one("CAST", *call.inputs, shape=shape)


def _reshape(call: Call) -> int:
    return call.reshaped(call.full(0), call.shape)


def _transpose(call: Call) -> int:
    order = [int(p) for p in call.eqn.params["permutation"]]
    given = call.graph.shape_of(call.inputs[0])
    moved = [given[p] for p in order]
    if [d for d in moved if d != 1] == [d for d in given if d != 1]:  # only axes of one element move
        return call.reshaped(call.inputs[0], placed(call.shape, moved))
    return call.one("TRANSPOSE", call.inputs[0], call.graph.constant(order, np.int32), shape=placed(call.shape, moved))


def _broadcast(call: Call) -> int:
    given, spread = call.graph.shape_of(call.inputs[0]), [1] * len(call.shape)
    for size, axis in zip(given, call.eqn.params["broadcast_dimensions"], strict=True):
        spread[axis] = size
    return call.reshaped(call.inputs[0], placed(call.shape, spread))


def _iota(call: Call) -> int:
    axis = call.eqn.params["dimension"]
    placed = [s if i == axis else 1 for i, s in enumerate(call.shape)]
    return call.graph.constant(np.arange(call.shape[axis], dtype=call.dtype).reshape(placed))


def _reduce(kind: str) -> Op:
    def emit(call: Call) -> int:
        axes = call.graph.constant(list(call.eqn.params["axes"]), np.int32)
        return call.one(kind, call.full(0), axes, keepDims=False, options="ReducerOptions")

    return emit


def _concatenate(call: Call) -> int:
    inputs = [call.full(i) for i in range(len(call.inputs))]
    return call.one("CONCATENATION", *inputs, axis=int(call.eqn.params["dimension"]), **NONE_ACTIVATION)


def _tile(call: Call) -> int:
    if set(call.eqn.params["reps"]) == {1}:
        return call.inputs[0]
    return call.one("TILE", call.full(0), call.graph.constant(open_dims(call.eqn.params["reps"]), np.int32))


def _split(call: Call) -> list[int]:
    sizes, axis = call.eqn.params["sizes"], int(call.eqn.params["axis"])
    inputs = [call.full(0), call.graph.constant(sizes, np.int32), call.graph.constant(axis, np.int32)]
    outputs = [(shape_of(var), call.dtype) for var in call.eqn.outvars]
    return call.graph.ops("SPLIT_V", inputs, outputs, numSplits=len(sizes), options="SplitVOptions")


def _slice(call: Call) -> int:
    p, shape = call.eqn.params, shape_of(call.eqn.invars[0])
    starts, ends = p["start_indices"], p["limit_indices"]
    steps = p["strides"] or [1] * len(shape)
    whole = lambda i: starts[i] == 0 and ends[i] == shape[i]
    mask = sum(1 << i for i in range(len(shape)) if whole(i))
    number = lambda of, i: 0 if whole(i) else int(of[i])
    each = lambda of: call.graph.constant([number(of, i) for i in range(len(shape))], np.int32)
    inputs = [call.full(0), each(starts), each(ends), call.graph.constant(steps, np.int32)]
    return call.one("STRIDED_SLICE", *inputs, beginMask=mask, endMask=mask)


def _pad(call: Call) -> int:
    config = [tuple(map(int, part)) for part in call.eqn.params["padding_config"]]
    if any(inside for _, _, inside in config) or any(low < 0 or high < 0 for low, high, _ in config):
        raise MpqError("padding between elements, or less than none, has no form in LiteRT")
    pads = call.graph.constant([[low, high] for low, high, _ in config], np.int32)
    if call.codes is not None:  # with the code of 0
        return call.one("PAD", call.full(0), pads)
    return call.one("PADV2", call.full(0), pads, call.reshaped(call.inputs[1], ()), options="PadV2Options")


def _gather(call: Call) -> int:
    """A slice whose start is computed; or whole slices at indices of one axis or several."""
    numbers, sizes = call.eqn.params["dimension_numbers"], call.eqn.params["slice_sizes"]
    operand, indices = (shape_of(v) for v in call.eqn.invars)
    axes, collapsed = tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)
    rest = [axis for axis in range(len(operand)) if axis not in axes]
    graph, at = call.graph, call.full(1)
    if numbers.operand_batching_dims or any(sizes[axis] != operand[axis] for axis in rest):
        raise MpqError("a gather of parts of slices has no form in LiteRT here")
    if not collapsed and len(indices) == 1 and axes == tuple(range(axes[0], axes[-1] + 1)):
        around = graph.constant([[axes[0], len(operand) - 1 - axes[-1]]], np.int32)
        starts = call.one("PAD", at, around, shape=[len(operand)], dtype="int32")
        ends = graph.constant([-1 if axis in rest else int(sizes[axis]) for axis in range(len(operand))], np.int32)
        return call.one("SLICE", call.full(0), starts, ends, options="SliceOptions")
    if collapsed != axes or any(sizes[axis] != 1 for axis in axes):
        raise MpqError("a gather of parts of slices has no form in LiteRT here")
    place = [axis for axis in range(len(indices) - 1 + len(rest)) if axis not in numbers.offset_dims]
    order = [*place, *numbers.offset_dims]
    made = [*indices[:-1], *(operand[axis] for axis in rest)]
    if len(axes) == 1:
        rows = call.reshaped(at, indices[:-1], "int32")
        first = call.full(0) if axes == (0,) else _to_front(call, axes, rest)
        values = call.one("GATHER", first, rows, shape=made, axis=0, batchDims=0)
    else:
        values = call.one("GATHER_ND", _to_front(call, axes, rest), at, shape=made, options="GatherNdOptions")
    if order == sorted(order):
        return values
    return call.one("TRANSPOSE", values, graph.constant(np.argsort(order).tolist(), np.int32))


def _to_front(call: Call, axes: Sequence[int], rest: Sequence[int]) -> int:
    order, operand = [*axes, *rest], shape_of(call.eqn.invars[0])
    if order == sorted(order):
        return call.full(0)
    return call.one(
        "TRANSPOSE", call.full(0), call.graph.constant(order, np.int32), shape=[operand[axis] for axis in order]
    )


def _top_k(call: Call) -> list[int]:
    k = call.graph.constant(int(call.eqn.params["k"]), np.int32)
    return call.graph.ops(
        "TOPK_V2", [call.full(0), k], [(call.shape, call.dtype), (call.shape, "int32")], options="TopKV2Options"
    )


def dot(call: Call) -> int:
    """`dot_general` of any kind: matrices of what is shared, kept and summed, multiplied one by one."""
    (sum_a, sum_b), (batch_a, batch_b) = call.eqn.params["dimension_numbers"]
    graph, shapes = call.graph, [shape_of(var) for var in call.eqn.invars]
    sides = []
    for i, summed, batch in ((0, sum_a, batch_a), (1, sum_b, batch_b)):
        free = [axis for axis in range(len(shapes[i])) if axis not in (*summed, *batch)]
        size = lambda axes, i=i: math.prod(shapes[i][axis] for axis in axes)
        shared = [shapes[i][axis] for axis in batch]
        value, last = call.full(i), i == 1 and [*batch, *free, *summed] == sorted([*batch, *free, *summed])
        order = [*batch, *free, *summed] if i == 0 or last else [*batch, *summed, *free]
        if order != sorted(order):
            moved = [shapes[i][axis] for axis in order]
            value = call.one("TRANSPOSE", value, graph.constant(order, np.int32), shape=moved)
        matrix = [size(free), size(summed)] if i == 0 or last else [size(summed), size(free)]
        sides.append((call.reshaped(value, [*shared, *matrix]), shared, size(free), last))
    (a, shared, m, _), (b, _, n, last) = sides
    options = {"adjX": False, "adjY": last, "options": "BatchMatMulOptions"}
    made = call.one("BATCH_MATMUL", a, b, shape=[*shared, m, n], **options)
    return call.reshaped(made, call.shape)


OPS: Mapping[str, Op] = MappingProxyType(
    {
        **{
            name: _same(kind, **NONE_ACTIVATION)
            for name, kind in {"add": "ADD", "sub": "SUB", "mul": "MUL", "div": "DIV"}.items()
        },
        **{
            name: _same(kind)
            for name, kind in {
                "max": "MAXIMUM", "min": "MINIMUM", "and": "LOGICAL_AND", "or": "LOGICAL_OR", "eq": "EQUAL",
                "ne": "NOT_EQUAL", "lt": "LESS", "gt": "GREATER", "le": "LESS_EQUAL", "ge": "GREATER_EQUAL",
                "pow": "POW", "neg": "NEG", "abs": "ABS", "exp": "EXP", "log": "LOG", "sqrt": "SQRT", "rsqrt": "RSQRT",
                "sin": "SIN", "cos": "COS", "tanh": "TANH", "logistic": "LOGISTIC", "floor": "FLOOR", "sign": "SIGN",
                "not": "LOGICAL_NOT", "square": "SQUARE",
            }.items()
        },
        "erf": _erf,
        "erfc": _erfc,
        "integer_pow": _integer_pow,
        "select_n": _select,
        "convert_element_type": _cast,
        "reshape": _reshape,
        "squeeze": _reshape,
        "expand_dims": _reshape,
        "transpose": _transpose,
        "broadcast_in_dim": _broadcast,
        "iota": _iota,
        "reduce_sum": _reduce("SUM"),
        "reduce_max": _reduce("REDUCE_MAX"),
        "reduce_min": _reduce("REDUCE_MIN"),
        "concatenate": _concatenate,
        "tile": _tile,
        "split": _split,
        "slice": _slice,
        "pad": _pad,
        "gather": _gather,
        "top_k": _top_k,
        "dot_general": dot,
        "reduce_window_max": max_pool,
    }
)  # fmt: skip
"""Primitive -> what emits it."""
