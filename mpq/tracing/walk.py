"""The walk over a jaxpr that finds every read of a parameter, without running anything.

Each variable carries its `Source`. Layout operations pass it on; calls, branches and loops are entered; a scan whose
scanned inputs hold weights is entered once a step, so that each slice is a weight of its own; any other operation ends
the trail and leaves a note why.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from jax.extend import core

from mpq.tracing import layout
from mpq.tracing.experts import Split, by_expert
from mpq.tracing.follow import Sources, hides_matmul, laid_out, opened, read_by
from mpq.tracing.reads import Read, Slot, Source

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

T = TypeVar("T")

Plan = dict[int, "int | Split | Inner"]
"""Of a jaxpr: number of the equation -> number of the read it is, or the plan of what it calls."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """An equation with reads inside.

    `how` is `inline`, `remat`, `custom` (a custom derivative), `cond` (one plan a branch), `while` (the plan of its
    body), `scan` (kept as a scan) or `unrolled` (one plan a step).
    """

    how: str
    plans: tuple[Plan, ...]


@dataclasses.dataclass(frozen=True)
class Note:
    """Why a trail ended; `hidden` if a matmul that cannot be replaced may lie behind it."""

    slot: Slot
    reason: str
    hidden: bool = False


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


def while_parts(params: dict[str, Any], values: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Constants of the condition, constants of the body and carried values among the operands of a while loop."""
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    return list(values[:first]), list(values[first:second]), list(values[second:])


class Walk:
    """The reads and notes found so far; one use, by `mpq.trace.trace`.

    `split` names stacks of experts whose matmuls are read expert by expert.
    """

    def __init__(self, split: Collection[Slot] = ()) -> None:
        self.reads: list[Read] = []
        self.notes: list[Note] = []
        self._split = split
        self._values: Iterator[int] = itertools.count()
        self._maybe: tuple[int, ...] = ()  # the branches and loop bodies around, which may run never or often

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

    def _equation(self, eqn: Any, sources: list[Source], times: int) -> tuple[int | Split | Inner | None, Sources]:
        """Plan entry and sources of the outputs; None for an output that is a new value."""
        name = eqn.primitive.name
        if (passed := laid_out(eqn, sources)) is not None:
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
        if name == "while":
            return self._while(eqn, sources, times), None
        # Where the branches are one for each platform, only the one that this machine needs may compile.
        if name == "cond" and eqn.params.get("branches_platforms") is None:
            return self._cond(eqn, sources, times)
        read, reason = read_by(eqn, sources, held)
        if read is None:
            self._note([sources[i] for i in held], reason, hidden=hides_matmul(eqn))
            return None, None
        if read.slot not in self._split:
            return self._add(read, times), None
        reads, dims, joined = by_expert(eqn, sources, read)
        return Split(tuple(self._add(read, times) for read in reads), dims, joined), None

    def _add(self, read: Read, times: int) -> int:
        """Number of the read. What may run more or less often than the rest has inputs of its own."""
        key = (self._maybe, read.input) if self._maybe else read.input
        self.reads.append(dataclasses.replace(read, macs=read.macs * times, input=key))
        return len(self.reads) - 1

    def _note(self, sources: Iterable[Source], reason: str, hidden: bool) -> None:
        self.notes += [Note(source.root, reason, hidden) for source in sources if isinstance(source.root, Slot)]

    def _perhaps(self, sub: Any, sources: Sequence[Source], times: int) -> tuple[Plan, list[Source]]:
        """Like `jaxpr`, for one that may run never or often."""
        around, self._maybe = self._maybe, (*self._maybe, next(self._values))
        plan, outs = self.jaxpr(sub, sources, times)
        self._maybe = around
        return plan, outs

    def _cond(self, eqn: Any, sources: list[Source], times: int) -> tuple[Inner | None, Sources]:
        """Every branch; only the multiply-accumulates of the most expensive one count."""
        branches, ranges = [], []
        for branch in eqn.params["branches"]:
            before = len(self.reads)
            branches.append(self._perhaps(branch, sources[1:], times))
            ranges.append(range(before, len(self.reads)))
        costs = [sum(self.reads[i].macs for i in numbers) for numbers in ranges]
        dearest = costs.index(max(costs))
        for i in itertools.chain(*(numbers for b, numbers in enumerate(ranges) if b != dearest)):
            self.reads[i] = dataclasses.replace(self.reads[i], macs=0)
        plans, outs = zip(*branches, strict=True)
        same = [out[0] if len(set(out)) == 1 else None for out in zip(*outs, strict=True)]
        for number, out in enumerate(zip(*outs, strict=True)):
            self._note(out if same[number] is None else (), "chosen by the branches of a `cond`", hidden=True)
        return (Inner("cond", plans) if any(plans) else None), same

    def _while(self, eqn: Any, sources: list[Source], times: int) -> Inner | None:
        """The body, as if it ran once: how often it runs is known only when it does."""
        cond_consts, body_consts, carry = while_parts(eqn.params, sources)
        self._note(carry, "carried and changed by a loop", hidden=True)
        changing = [self.fresh(var) for var in eqn.outvars]
        before = len(self.reads)
        self.jaxpr(eqn.params["cond_jaxpr"], [*cond_consts, *changing], times)
        for read in self.reads[before:]:
            self.notes.append(Note(read.slot, "read in the condition of a `while` loop", hidden=True))
        del self.reads[before:]
        plan, outs = self._perhaps(eqn.params["body_jaxpr"], [*body_consts, *changing], times)
        self._note(outs, "passed on by a loop", hidden=True)
        return Inner("while", (plan,)) if plan else None

    def _scan(self, eqn: Any, sources: list[Source], times: int) -> tuple[Inner | None, Sources]:
        """Unrolled if a slice of a scanned parameter is read inside, else one body that runs `length` times."""
        consts, carry, xs = scan_parts(eqn.params, sources)
        self._note((s for s in xs if s.at(0, 0) is None), "scanned along a part of an axis", hidden=True)
        before = len(self.reads)
        if (unrolled := self._unrolled(eqn, sources, times)) is not None:
            return unrolled
        del self.reads[before:]
        self._note(carry, "carried and changed by a loop", hidden=True)
        body = eqn.params["jaxpr"]
        others = [self.fresh(var) for var in opened(body)[0].invars[len(consts) :]]
        plan, outs = self.jaxpr(body, [*consts, *others], times * eqn.params["length"])
        self._note(outs, "passed on by a loop", hidden=True)
        passed = dict(zip(others[len(carry) :], xs, strict=True))  # what leaves as it came in, slice by slice
        ys = [passed.get(out) for out in outs[len(carry) :]]
        return (Inner("scan", (plan,)) if plan else None), [*[None] * len(carry), *ys]

    def _unrolled(self, eqn: Any, sources: list[Source], times: int) -> tuple[Inner, Sources] | None:
        """The scan, step by step; None as soon as the first step shows that no slice of a parameter is read."""
        body = eqn.params["jaxpr"]
        consts, carry, xs = scan_parts(eqn.params, sources)
        if not eqn.params["length"] or not any(isinstance(s.root, Slot) for s in xs):
            return None
        before, plans, slices, rows = len(self.reads), [], [], []
        for step in scan_steps(eqn.params):
            variables = opened(body)[0].invars[-len(xs) :]
            slices.append([s.at(0, step) or self.fresh(v) for s, v in zip(xs, variables, strict=True)])
            plan, outs = self.jaxpr(body, [*consts, *carry, *slices[-1]], times)
            carry, row = outs[: len(carry)], outs[len(carry) :]
            self._note((out for out in row if out not in slices[-1]), "passed on by a loop", hidden=True)
            roots = [s.root for s in slices[-1] if isinstance(s.root, Slot)]
            if not plans and not any(read.slot.within(root) for read in self.reads[before:] for root in roots):
                return None
            plans.append(plan)
            rows.append(row)
        passed = dict(zip(zip(*slices, strict=True), xs, strict=True))  # what leaves as it came in, slice by slice
        return Inner("unrolled", tuple(plans)), [*carry, *map(passed.get, zip(*rows, strict=True))]
