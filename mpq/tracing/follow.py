"""What one equation does with the parameters among its operands: pass them on, read one, or end their trail."""

import math
from collections.abc import Sequence
from typing import Any

from jax import numpy as jnp
from jax.extend import core

from mpq.tracing import layout
from mpq.tracing.reads import Read, Source, conv_read, dot_read, gather_read

_COPIES = {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint"}
_COPIES |= {"name", "optimization_barrier", "device_put", "layout_constraint", "pvary", "reshard"}
_LAYOUT = _COPIES | {"reshape", "squeeze", "transpose", "broadcast_in_dim", "slice"}
_BROADCASTING = {"broadcast_in_dim", "add", "sub", "mul", "div", "max", "min", "pow", "select_n"}
SCALE = "broadcast over activations by a product: a scale, not a matrix"
"""The reason of a parameter that multiplies or divides activations, element by element."""
_RAGGED = {"ragged_dot", "ragged_dot_general"}
_MATMULS = _RAGGED | {"dot_general", "conv_general_dilated", "gather"}

Sources = Sequence[Source | None] | None
"""Of the outputs of an equation: None for a new value, or for all of them."""


def opened(sub: Any) -> tuple[Any, Sequence[Any]]:
    """Jaxpr and constants of a closed jaxpr or a jaxpr: JAX 0.10 has two types, 0.11 has one."""
    return getattr(sub, "jaxpr", sub), getattr(sub, "consts", ())


def laid_out(eqn: Any, sources: Sequence[Source]) -> Sources:
    """Sources of the outputs of an operation that only lays elements out anew or rounds them; None for any other."""
    name, params, source = eqn.primitive.name, eqn.params, sources[0] if sources else None
    if source is None or name not in _LAYOUT:
        return None
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    axes: layout.Axes | None = None
    if name in _COPIES:
        same = lambda a, b: a.shape == b.shape and _kind(a) == _kind(b)
        pairs = zip(eqn.invars, eqn.outvars, sources, strict=True)
        return [s if same(a.aval, b.aval) else None for a, b, s in pairs]
    if name == "squeeze":
        axes = layout.reshape(source.axes, after.shape)
    elif name == "reshape":  # `dimensions`: of a transpose that comes first
        order = params["dimensions"] or range(len(before.shape))
        axes = layout.reshape(tuple(source.axes[axis] for axis in order), after.shape)
    elif name == "transpose":
        axes = tuple(source.axes[axis] for axis in params["permutation"])
    elif name == "broadcast_in_dim" and math.prod(before.shape) == math.prod(after.shape):
        placed = dict(zip(params["broadcast_dimensions"], source.axes, strict=True))
        axes = tuple(placed.get(axis, ()) for axis in range(len(after.shape)))
    elif name == "slice":
        return _sliced(params["start_indices"], before.shape, after.shape, source)
    return None if axes is None else [Source(source.root, axes)]


def _sliced(starts: Sequence[int], before: Sequence[int], after: Sequence[int], source: Source) -> Sources:
    """Source of a static slice, if it takes everything, or one position along one axis of a parameter."""
    cut = [dim for dim in range(len(before)) if before[dim] != after[dim]]
    if not cut:
        return [source]
    if len(cut) > 1 or after[cut[0]] != 1 or (row := source.at(cut[0], starts[cut[0]])) is None:
        return None
    return [Source(row.root, (*row.axes[: cut[0]], (), *row.axes[cut[0] :]))]


def read_by(eqn: Any, sources: Sequence[Source], held: Sequence[int]) -> tuple[Read | None, str]:
    """The read that the equation is, of the one parameter among its operands; else None and the reason.

    Args:
      eqn: the equation.
      sources: of its operands.
      held: the operands that are parameters; at least one.
    """
    name, avals, out = eqn.primitive.name, [v.aval for v in eqn.invars], eqn.outvars[0].aval
    if name == "dot_general" or name == "conv_general_dilated":
        if len(held) == 2:
            return None, "multiplied by another parameter, not by an activation"
        operand = held[0]
        if name == "dot_general":
            return dot_read(eqn.params, operand, sources[operand], sources[1 - operand], avals, out), ""
        if operand == 0:
            return None, "the input of a convolution, not its kernel"
        if eqn.params["batch_group_count"] > 1:
            return None, "the kernel of a convolution with batch groups"
        return conv_read(eqn.params, sources[1], sources[0], avals, out), "its output channels mix with other axes"
    if name == "gather" and held == [0] and (read := gather_read(eqn.params, sources[0], sources[1], avals, out)):
        return read, ""
    if name in ("reshape", "squeeze"):
        return None, f"its axes are mixed by a reshape from {avals[0].shape} to {out.shape}"
    if name in ("slice", "dynamic_slice", "gather", "split"):
        return None, f"read in parts (`{name}`)"
    if has_matmul(eqn):
        return None, f"read inside `{name}`, where a read cannot be replaced"
    if name in _RAGGED:
        return None, f"read by `{name}`, a matmul that cannot be replaced"
    if name in _BROADCASTING and any(math.prod(avals[i].shape) < math.prod(out.shape) for i in held):
        if name in ("mul", "div") and len(held) == 1:
            return None, SCALE
        return None, "broadcast over activations: a bias or a scale, not a matrix"
    return None, f"read by `{name}`, not by a matmul"


def hides_matmul(eqn: Any) -> bool:
    """Whether a matmul that cannot be replaced is the equation itself, or inside it."""
    return eqn.primitive.name in _RAGGED or has_matmul(eqn)


def has_matmul(eqn: Any) -> bool:
    """Whether a jaxpr inside the equation holds a matmul, a convolution or a lookup."""
    return any(
        inner.primitive.name in _MATMULS or has_matmul(inner)
        for sub in core.jaxprs_in_params(eqn.params)
        for inner in opened(sub)[0].eqns
    )


def _kind(aval: Any) -> str:
    return next((k.__name__ for k in (jnp.floating, jnp.integer) if jnp.issubdtype(aval.dtype, k)), str(aval.dtype))
