"""The walk over a jaxpr that finds every read of a parameter, without running anything.

Each variable carries its `Source`. Layout operations pass it on; calls are entered; a scan whose scanned inputs hold
weights is entered once a step, so that each slice is a weight of its own; any other operation ends the trail and
leaves a note why.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from jax import numpy as jnp
from jax.extend import core

from mpq.tracing import layout
from mpq.tracing.reads import Read, Slot, Source, conv_read, dot_read, gather_read

CALLS = {
    "jit": ("inline", "jaxpr"),
    "pjit": ("inline", "jaxpr"),
    "closed_call": ("inline", "call_jaxpr"),
    "core_call": ("inline", "call_jaxpr"),
    "remat2": ("remat", "jaxpr"),
    "checkpoint": ("remat", "jaxpr"),
    "custom_jvp_call": ("custom", "call_jaxpr"),
    "custom_vjp_call": ("custom", "call_jaxpr"),
    "custom_vjp_call_jaxpr": ("custom", "fun_jaxpr"),
}
"""Calls that are entered: how they are evaluated, and the parameter that holds what they call."""

_COPIES = {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint"}
_COPIES |= {"name", "optimization_barrier", "device_put", "layout_constraint", "pvary"}
_LAYOUT = _COPIES | {"reshape", "squeeze", "transpose", "broadcast_in_dim", "slice"}
_BROADCASTING = {"broadcast_in_dim", "add", "sub", "mul", "div", "max", "min", "pow", "select_n"}
T = TypeVar("T")
_Sources = Sequence[Source | None] | None

Plan = dict[int, "int | Inner"]
"""Of a jaxpr: number of the equation -> number of the read it is, or the plan of what it calls."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """An equation with reads inside.

    `how` is `inline`, `remat`, `custom` (a custom derivative), `scan` (kept as a scan) or `unrolled` (one plan a step).
    """

    how: str
    plans: tuple[Plan, ...]


@dataclasses.dataclass(frozen=True)
class Note:
    """Why a trail ended; `hidden` if a matmul that cannot be replaced may lie behind it."""

    slot: Slot
    reason: str
    hidden: bool = False


def opened(sub: Any) -> tuple[Any, Sequence[Any]]:
    """Jaxpr and constants of a closed jaxpr or a jaxpr: JAX 0.10 has two types, 0.11 has one."""
    return getattr(sub, "jaxpr", sub), getattr(sub, "consts", ())


def scan_parts(params: dict[str, Any], values: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Constants, carried values and scanned inputs among the operands of a scan, or what belongs to them."""
    if "num_consts" in params:  # JAX 0.10
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.11: one flat tree each
        num_consts, num_carry = (len(tuple(tree.vals)) for tree in params["ft_in"].unpack()[:2])
    start = num_consts + num_carry
    return list(values[:num_consts]), list(values[num_consts:start]), list(values[start:])


def scan_steps(params: dict[str, Any]) -> range:
    """The steps of a scan in the order in which they run."""
    steps = range(params["length"])
    return steps[::-1] if params["reverse"] else steps


class Walk:
    """The reads and notes found so far; one use, by `mpq.trace.trace`."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.notes: list[Note] = []
        self._values: Iterator[int] = itertools.count()

    def fresh(self, var: Any) -> Source:
        """The source of a new value, held by the variable `var`."""
        return Source(next(self._values), layout.identity(getattr(var.aval, "shape", ())))

    def jaxpr(self, sub: Any, sources: Sequence[Source], times: int) -> tuple[Plan, list[Source]]:
        """Walk a jaxpr that is evaluated `times` times.

        Args:
          sub: a jaxpr, closed or not.
          sources: of its inputs.
          times: repetitions, by which multiply-accumulates count.

        Returns:
          Its plan and the sources of its outputs.
        """
        jaxpr, _ = opened(sub)
        env: dict[Any, Source] = dict(zip(jaxpr.invars, sources, strict=True))
        env.update((var, self.fresh(var)) for var in jaxpr.constvars)
        source = lambda v: self.fresh(v) if isinstance(v, core.Literal) else env[v]
        plan: Plan = {}
        for number, eqn in enumerate(jaxpr.eqns):
            entry, outs = self._equation(eqn, [source(v) for v in eqn.invars], times)
            if entry is not None:
                plan[number] = entry
            outs = outs or [None] * len(eqn.outvars)
            env.update((var, out or self.fresh(var)) for var, out in zip(eqn.outvars, outs, strict=True))
        return plan, [source(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, sources: list[Source], times: int) -> tuple[int | Inner | None, _Sources]:
        """Plan entry and sources of the outputs; None for an output that is a new value."""
        name = eqn.primitive.name
        if (passed := _layout(eqn, sources)) is not None:
            return None, passed
        if name in CALLS and len(opened(eqn.params[CALLS[name][1]])[0].invars) == len(sources):
            how, key = CALLS[name]
            plan, outs = self.jaxpr(eqn.params[key], sources, times)
            return (Inner(how, (plan,)) if plan else None), outs
        held = [i for i, source in enumerate(sources) if isinstance(source.root, Slot)]
        if not held:
            return None, None
        if name == "scan":
            return self._scan(eqn, sources, times)
        read, reason = _read(eqn, sources, held)
        if read is None:
            self._note([sources[i] for i in held], reason, hidden=_has_matmul(eqn))
            return None, None
        self.reads.append(dataclasses.replace(read, macs=read.macs * times))
        return len(self.reads) - 1, None

    def _note(self, sources: Iterable[Source], reason: str, hidden: bool) -> None:
        self.notes += [Note(source.root, reason, hidden) for source in sources if isinstance(source.root, Slot)]

    def _scan(self, eqn: Any, sources: list[Source], times: int) -> tuple[Inner | None, _Sources]:
        """Unrolled if a slice of a scanned parameter is read inside, else one body that runs `length` times."""
        consts, carry, xs = scan_parts(eqn.params, sources)
        self._note((s for s in xs if _at(s, 0) is None), "scanned along an axis that is not its first", hidden=True)
        before = len(self.reads)
        if (unrolled := self._unrolled(eqn, sources, times)) is not None:
            return unrolled
        del self.reads[before:]
        self._note(carry, "carried from step to step by a scan", hidden=True)
        body = eqn.params["jaxpr"]
        others = [self.fresh(var) for var in opened(body)[0].invars[len(consts) :]]
        plan, _ = self.jaxpr(body, [*consts, *others], times * eqn.params["length"])
        return (Inner("scan", (plan,)) if plan else None), None

    def _unrolled(self, eqn: Any, sources: list[Source], times: int) -> tuple[Inner, _Sources] | None:
        """The scan, step by step; None as soon as the first step shows that no slice of a parameter is read."""
        body, num_outs = eqn.params["jaxpr"], len(eqn.outvars)
        consts, carry, xs = scan_parts(eqn.params, sources)
        if not any(isinstance(s.root, Slot) for s in xs):
            return None
        before, plans = len(self.reads), []
        for step in scan_steps(eqn.params):
            slices = [_at(s, step) for s in xs]
            inner = [s or self.fresh(v) for s, v in zip(slices, opened(body)[0].invars[-len(xs) :], strict=True)]
            plan, outs = self.jaxpr(body, [*consts, *carry, *inner], times)
            roots = {s.root for s in slices if s is not None}
            if not plans and not any(read.slot in roots for read in self.reads[before:]):
                return None
            plans.append(plan)
            carry = outs[: len(carry)]
        return Inner("unrolled", tuple(plans)), [*carry, *[None] * (num_outs - len(carry))]


def _at(source: Source, step: int) -> Source | None:
    """The slice `step` along the first axis; None unless that is the first axis of a parameter."""
    if not isinstance(source.root, Slot) or not source.root.shape:
        return None
    param, index, (length, *shape) = source.root.param, source.root.index, source.root.shape
    if source.axes[0] != layout.identity((length,))[0]:
        return None
    inner = tuple(tuple(factor._replace(axis=factor.axis - 1) for factor in axis) for axis in source.axes[1:])
    return Source(Slot(param, (*index, step), tuple(shape)), inner)


def _layout(eqn: Any, sources: list[Source]) -> _Sources:
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
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        axes = layout.reshape(source.axes, after.shape)
    elif name == "transpose":
        axes = tuple(source.axes[axis] for axis in params["permutation"])
    elif name == "broadcast_in_dim" and math.prod(before.shape) == math.prod(after.shape):
        placed = dict(zip(params["broadcast_dimensions"], source.axes, strict=True))
        axes = tuple(placed.get(axis, ()) for axis in range(len(after.shape)))
    elif name == "slice" and before.shape == after.shape:
        axes = source.axes
    elif name == "slice" and after.shape == (1, *before.shape[1:]) and (row := _at(source, params["start_indices"][0])):
        return [Source(row.root, ((), *row.axes))]
    return None if axes is None else [Source(source.root, axes)]


def _read(eqn: Any, sources: list[Source], held: list[int]) -> tuple[Read | None, str]:
    """The read that the equation is, of the one parameter among its operands; else None and the reason."""
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
    if _has_matmul(eqn):
        return None, f"read inside `{name}`, where a read cannot be replaced"
    if name in _BROADCASTING and any(math.prod(avals[i].shape) < math.prod(out.shape) for i in held):
        return None, "broadcast over activations: a bias or a scale, not a matrix"
    return None, f"read by `{name}`, not by a matmul"


def _has_matmul(eqn: Any) -> bool:
    """Whether a jaxpr inside the equation holds a matmul, a convolution or a lookup."""
    return any(
        inner.primitive.name in ("dot_general", "conv_general_dilated", "gather") or _has_matmul(inner)
        for sub in core.jaxprs_in_params(eqn.params)
        for inner in opened(sub)[0].eqns
    )


def _kind(aval: Any) -> str:
    return next((k.__name__ for k in (jnp.floating, jnp.integer) if jnp.issubdtype(aval.dtype, k)), str(aval.dtype))
