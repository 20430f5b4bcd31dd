"""One operation that reads a weight: its matrix views, what it multiplies, its multiply-accumulates.

The canonical view of a weight is `w[batch, k, n]`: the axes shared with the input and the output, the contracted axes
and the free ones, each in the weight's own memory order whatever the order in the operation. Inputs and outputs are
viewed to match: `inputs_matrix[batch, tokens, k] @ w[batch, k, n] == outputs_matrix[batch, tokens, n]`.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpq.tracing import layout
from mpq.tracing.layout import BATCH, COLUMN, ROW, Factor, MatrixView, Part

Shaped = Any
"""Anything with `shape` and `dtype`: an array, a `ShapeDtypeStruct` or an abstract value."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter, or a slice of it: `index` holds a position, or None for a whole axis; `shape` is the slice's."""

    param: str
    index: tuple[int | None, ...]
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """`param`, or `param[i]`, `param[i,j]`, `param[:,j]`."""
        return self.param + show_index(self.index)

    def at(self, axis: int, position: int) -> "Slot":
        """The slice at `position` along an axis of this one."""
        index = [*self.index, *[None] * (axis + 1)]
        whole = [i for i, at in enumerate(index) if at is None]
        index[whole[axis]] = position
        last = max(i for i, at in enumerate(index) if at is not None)
        return Slot(self.param, tuple(index[: last + 1]), self.shape[:axis] + self.shape[axis + 1 :])

    def within(self, other: "Slot") -> bool:
        """Whether this is the other, or a slice of it."""
        pairs = itertools.zip_longest(self.index, other.index)
        return self.param == other.param and all(theirs is None or ours == theirs for ours, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Source:
    """What an array is a reshaped, transposed or cast copy of: a parameter, or the numbered result of an operation."""

    root: Slot | int
    axes: layout.Axes

    def at(self, dim: int, position: int) -> "Source | None":
        """The slice at `position` along `dim`; None unless that is one whole axis of a parameter, or has size 1."""
        if not isinstance(self.root, Slot):
            return None
        rest, shape = self.axes[:dim] + self.axes[dim + 1 :], self.root.shape
        if not self.axes[dim] and shape[:1] != (1,):
            return Source(self.root, rest)
        axis = self.axes[dim][0].axis if self.axes[dim] else 0
        if self.axes[dim] != layout.identity(shape)[axis]:
            return None
        shifted = lambda f: f._replace(axis=f.axis - (f.axis > axis))
        return Source(self.root.at(axis, position), tuple(tuple(map(shifted, factors)) for factors in rest))


def show_index(index: Sequence[int | None]) -> str:
    """`[i,j]`, with `:` for a whole axis; nothing for the whole array."""
    return "[" + ",".join(":" if i is None else str(i) for i in index) + "]" if index else ""


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution's input as rows: one window an output position. Static and hashable."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    dimensions: lax.ConvDimensionNumbers
    view: MatrixView

    def __call__(self, x: jax.Array) -> jax.Array:
        """The input of the convolution to `[batch, tokens, k]`, of any dtype: values are copied, none is computed."""
        x_batch, x_features, *x_spatial = self.dimensions.lhs_spec
        y_batch, features, *spatial = self.dimensions.out_spec
        source = dict(zip((y_batch, features, *spatial), (x_batch, x_features, *x_spatial), strict=True))
        padding = [(0, 0, 0)] * x.ndim
        for dim, (low, high), dilation in zip(x_spatial, self.padding, self.input_dilation, strict=True):
            padding[dim] = (low, high, dilation - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), padding).transpose([source[dim] for dim in range(x.ndim)])
        # One dimension after the other: of a window of 16 x 16, 32 slices instead of 256. The last one first, so that
        # its offset is the fastest, as it is in most weights.
        dims = zip(spatial, self.window, self.strides, self.kernel_dilation, strict=True)
        for dim, size, stride, step in reversed(list(dims)):
            last = x.shape[dim] - (size - 1) * step
            shifted = [lax.slice_in_dim(x, i * step, last + i * step, stride, dim) for i in range(size)]
            x = lax.concatenate(shifted, features)
        return self.view(x)


@dataclasses.dataclass(frozen=True)
class Read:
    """A weight's read by a `dot_general`, a `conv_general_dilated` or an embedding `gather`.

    Attributes:
      kind: `matmul`, `conv` or `embedding`.
      slot: the parameter or slice that is read.
      batch, k, n: the factors of the weight's canonical view, in order.
      input: reads with equal keys see the same `inputs_matrix`, up to the order of its rows and its dtype.
      macs: multiply-accumulates over all repetitions of the operation.
      operand: position of the weight among the operation's operands.
      inputs: the input to `[batch, tokens, k]`; None for an embedding.
      weights: the weight as the operation gets it to `[batch, k, n]`.
      outputs: the output to `[batch, tokens, n]`; for an embedding to `[1, tokens, k]`.
      token_shape: shape whose flattening is the order of `tokens`.
      output: shape and dtype of the output.
      stack: the weight's dimension, as the operation gets it, that is the parameter's whole first axis and not
        contracted: a stack of experts can be divided there. None otherwise.
    """

    kind: str
    slot: Slot
    batch: tuple[Factor, ...]
    k: tuple[Factor, ...]
    n: tuple[Factor, ...]
    input: Hashable
    macs: int
    operand: int
    inputs: MatrixView | Patches | None
    weights: MatrixView
    outputs: MatrixView
    token_shape: tuple[int, ...]
    output: jax.ShapeDtypeStruct
    stack: int | None = None


def dot_read(params: dict[str, Any], operand: int, weight: Source, x: Source, avals: list[Shaped], out: Shaped) -> Read:
    """The read of `weight`, operand number `operand` of a `dot_general`."""
    contracting, batch = params["dimension_numbers"]
    w_contracting, x_contracting = contracting[operand], contracting[1 - operand]
    w_batch, x_batch = batch[operand], batch[1 - operand]
    w_shape, x_shape = avals[operand].shape, avals[1 - operand].shape
    w_free = [d for d in range(len(w_shape)) if d not in w_contracting and d not in w_batch]
    x_free = [d for d in range(len(x_shape)) if d not in x_contracting and d not in x_batch]

    shared = {d: layout.parts(BATCH, weight.axes[e]) for d, e in zip(x_batch, w_batch, strict=True)}
    contracted = {d: layout.parts(COLUMN, weight.axes[e]) for d, e in zip(x_contracting, w_contracting, strict=True)}
    tokens = {d: [Part(ROW, (d,), x_shape[d])] for d in x_free}
    x_parts = shared | contracted | tokens
    w_roles = dict.fromkeys(w_batch, BATCH) | dict.fromkeys(w_contracting, ROW) | dict.fromkeys(w_free, COLUMN)
    columns = [layout.parts(COLUMN, weight.axes[d]) for d in w_free]
    rows = list(tokens.values())
    free = columns + rows if operand == 0 else rows + columns

    flat = [p for d in range(len(x_shape)) for p in x_parts[d]]
    k = _factors(weight, w_contracting)
    return Read(
        kind="matmul",
        slot=_slot(weight),
        batch=_factors(weight, w_batch),
        k=k,
        n=_factors(weight, w_free),
        input=_input_key(x, flat),
        macs=math.prod(out.shape) * math.prod(f.size for f in k),
        operand=operand,
        inputs=layout.matrix_view(x_shape, flat),
        weights=layout.matrix_view(
            w_shape, [p for d, r in sorted(w_roles.items()) for p in layout.parts(r, weight.axes[d])]
        ),
        outputs=layout.matrix_view(out.shape, [p for axis in [*(shared[d] for d in x_batch), *free] for p in axis]),
        token_shape=tuple(x_shape[d] for d in x_free),
        output=jax.ShapeDtypeStruct(out.shape, out.dtype),
        stack=_stack(weight, [*w_batch, *w_free]),
    )


def conv_read(params: dict[str, Any], weight: Source, x: Source, avals: list[Shaped], out: Shaped) -> Read | None:
    """The read of a convolution's kernel; None if its output channels cannot be split into the feature groups.

    `k` is the input channels of one feature group times the window, `n` the output channels of one group, `batch` the
    groups.
    """
    (x_axes, w_axes, y_axes), groups = params["dimension_numbers"], params["feature_group_count"]
    w_shape = avals[1].shape
    split_shape = list(w_shape)
    split_shape[w_axes[0] : w_axes[0] + 1] = [groups, w_shape[w_axes[0]] // groups]
    split = layout.reshape(weight.axes, split_shape)
    if split is None:
        return None
    group_dim, free_dim = w_axes[0], w_axes[0] + 1
    moved = lambda d: d + 1 if d > w_axes[0] else d
    channel_dim, *window_dims = contracted_dims = [moved(d) for d in w_axes[1:]]
    weight = Source(weight.root, split)

    grouped = layout.parts(BATCH, split[group_dim])
    columns = layout.parts(COLUMN, split[free_dim])
    window = [p for d in window_dims for p in layout.parts(COLUMN, split[d])]
    channels = layout.parts(COLUMN, split[channel_dim])
    tokens = {d: [Part(ROW, (d,), out.shape[d])] for d in range(len(out.shape)) if d != y_axes[1]}
    token_shape = tuple(out.shape[d] for d in sorted(tokens))
    y_parts = tokens | {y_axes[1]: grouped + columns}
    patch_parts = tokens | {y_axes[1]: window + grouped + channels}  # as `Patches` lays them out
    k = _factors(weight, contracted_dims)
    patch_shape = list(out.shape)
    patch_shape[y_axes[1]] = groups * math.prod(f.size for f in k)
    w_roles = dict.fromkeys(contracted_dims, ROW) | {group_dim: BATCH, free_dim: COLUMN}

    flat = lambda table: [p for d in sorted(table) for p in table[d]]
    inputs = Patches(
        window=tuple(w_shape[d] for d in w_axes[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        dimensions=lax.ConvDimensionNumbers(tuple(x_axes), tuple(range(len(w_shape))), tuple(y_axes)),
        view=layout.matrix_view(patch_shape, flat(patch_parts)),
    )
    return Read(
        kind="conv",
        slot=_slot(weight),
        batch=_factors(weight, [group_dim]),
        k=k,
        n=_factors(weight, [free_dim]),
        input=(x.root, x.axes, inputs),
        macs=math.prod(out.shape) * math.prod(f.size for f in k),
        operand=1,
        inputs=inputs,
        weights=_weight_view(w_shape, w_roles, split),
        outputs=layout.matrix_view(out.shape, flat(y_parts)),
        token_shape=token_shape,
        output=jax.ShapeDtypeStruct(out.shape, out.dtype),
    )


def gather_read(params: dict[str, Any], weight: Source, x: Source, avals: list[Shaped], out: Shaped) -> Read | None:
    """The read of an embedding table `[V, D]` (or `[D, V]`) by integer indices; None for any other gather.

    The canonical view is that of the tied head's matmul: `k = D`, `n = V`.
    """
    numbers, shape = params["dimension_numbers"], avals[0].shape
    looked_up = tuple(numbers.start_index_map)
    if len(shape) != 2 or len(looked_up) != 1 or tuple(numbers.collapsed_slice_dims) != looked_up:
        return None
    row = looked_up[0]
    if params["slice_sizes"][1 - row] != shape[1 - row]:
        return None
    hidden = layout.parts(COLUMN, weight.axes[1 - row])
    offset = numbers.offset_dims[0]
    tokens = {d: [Part(ROW, (d,), out.shape[d])] for d in range(len(out.shape)) if d != offset}
    y_parts = tokens | {offset: hidden}
    w_parts = {row: layout.parts(COLUMN, weight.axes[row]), 1 - row: layout.parts(ROW, weight.axes[1 - row])}
    return Read(
        kind="embedding",
        slot=_slot(weight),
        batch=(),
        k=_factors(weight, [1 - row]),
        n=_factors(weight, [row]),
        input=("indices", x.root, x.axes),
        macs=0,
        operand=0,
        inputs=None,
        weights=layout.matrix_view(shape, [*w_parts[0], *w_parts[1]]),
        outputs=layout.matrix_view(out.shape, [p for d in sorted(y_parts) for p in y_parts[d]]),
        token_shape=tuple(avals[1].shape[:-1]),
        output=jax.ShapeDtypeStruct(out.shape, out.dtype),
    )


def _weight_view(shape: Sequence[int], roles: dict[int, int], axes: layout.Axes) -> MatrixView:
    return layout.matrix_view(shape, [p for d, role in sorted(roles.items()) for p in layout.parts(role, axes[d])])


def _slot(weight: Source) -> Slot:
    assert isinstance(weight.root, Slot)
    return weight.root


def _stack(weight: Source, dims: Sequence[int]) -> int | None:
    first = layout.identity(_slot(weight).shape)[0]
    return next((d for d in dims if first and weight.axes[d] == first), None)


def _factors(source: Source, dims: Any) -> tuple[Factor, ...]:
    return layout.merge(layout.in_memory_order(factor for d in dims for factor in source.axes[d]))


def _input_key(x: Source, parts: list[Part]) -> Hashable:
    """Equal for reads whose `[batch, tokens, k]` views, made of `parts` of one array, hold the same rows."""
    split = layout.reshape(x.axes, [part.size for part in parts])
    if split is None:
        return x.root, x.axes, tuple(parts)
    ordered = sorted(zip(parts, split, strict=True), key=lambda pair: pair[0][:2])
    joined = lambda role: layout.merge(f for part, factors in ordered if part.role == role for f in factors)
    return x.root, joined(BATCH), joined(COLUMN)
