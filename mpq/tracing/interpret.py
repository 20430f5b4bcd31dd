"""Evaluation of a jaxpr with the reads of weights handed to a visitor, along the plan that the walk made."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import numpy as jnp
from jax.extend import core

from mpq.tracing.experts import Split
from mpq.tracing.follow import opened
from mpq.tracing.walk import CALLS, Inner, Plan, scan_parts, scan_steps, while_parts


class Visitor(Protocol):
    """Stands in for read number `number`; `default(operands)` is the operation itself."""

    def __call__(
        self, number: int, operands: list[jax.Array], default: Callable[..., jax.Array], state: Any
    ) -> tuple[jax.Array, Any]: ...


class Interpreter:
    """Runs a jaxpr under an outer trace; `state` is threaded through every visit in the order of execution.

    Calls are inlined, except those that mean something: rematerialization stays, branches and loops stay what they are
    (only a scan over weights is unrolled), and a function with a derivative rule of its own keeps the rule as long as
    no visit inside it changed a result. Once one did, the rule no longer belongs to the function and its body is
    differentiated as it stands.
    """

    def __init__(self, visit: Visitor):
        self._visit = visit
        self._changed = False

    def run(self, plan: Plan, sub: Any, args: Sequence[Any], state: Any) -> tuple[list[Any], Any]:
        """Outputs of the jaxpr `sub` for `args`, and the state after them."""
        jaxpr, consts = opened(sub)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
            zip(jaxpr.invars, args, strict=True)
        )
        value = lambda v: v.val if isinstance(v, core.Literal) else env[v]
        for number, eqn in enumerate(jaxpr.eqns):
            outs, state = self._equation(plan.get(number), eqn, [value(v) for v in eqn.invars], state)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [value(v) for v in jaxpr.outvars], state

    def _equation(
        self, entry: int | Split | Inner | None, eqn: Any, args: list[Any], state: Any
    ) -> tuple[Sequence[Any], Any]:
        if entry is None:
            return bind(eqn, args), state
        if isinstance(entry, int):
            return self._read(entry, eqn, args, state)
        if isinstance(entry, Split):
            return self._split(entry, eqn, args, state)
        rules = {
            "inline": self._inline,
            "remat": self._remat,
            "custom": self._custom,
            "cond": self._cond,
            "while": self._while,
            "scan": self._scan,
            "unrolled": self._unrolled,
        }
        return rules[entry.how](entry, eqn, args, state)

    def _read(self, number: int, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        originals = []

        def default(*operands: jax.Array) -> jax.Array:
            (out,) = bind(eqn, operands)
            if all(a is b for a, b in zip(operands, args, strict=True)):
                originals.append(out)
            return out

        out, state = self._visit(number, args, default, state)
        self._changed |= not any(out is original for original in originals)
        return [out], state

    def _split(self, entry: Split, eqn: Any, args: list[Any], state: Any) -> tuple[Sequence[Any], Any]:
        """Expert by expert; as a whole, to the bit, where nothing was changed."""
        before, self._changed, outs = self._changed, False, []
        for expert, number in enumerate(entry.reads):
            own = lambda array, dim, e=expert: array if dim is None else jax.lax.slice_in_dim(array, e, e + 1, axis=dim)
            (out,), state = self._read(number, eqn, list(map(own, args, entry.dims)), state)
            outs.append(out)
        joined = [jnp.concatenate(outs, axis=entry.joined)] if self._changed else bind(eqn, args)
        self._changed |= before
        return joined, state

    def _inline(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        return self.run(entry.plans[0], _called(eqn), args, state)

    def _remat(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        body = lambda state, *args: self.run(entry.plans[0], _called(eqn), args, state)
        keep = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        return jax.checkpoint(body, **keep)(state, *args)

    def _custom(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[Sequence[Any], Any]:
        before, self._changed = self._changed, False
        outs, state = self.run(entry.plans[0], _called(eqn), args, state)
        if not self._changed:
            outs = bind(eqn, args)
        self._changed |= before
        return outs, state

    def _cond(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        branch = lambda plan, sub: lambda state, *args: self.run(plan, sub, args, state)
        branches = [branch(*both) for both in zip(entry.plans, eqn.params["branches"], strict=True)]
        return jax.lax.switch(args[0], branches, state, *args[1:])

    def _while(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        params = eqn.params
        cond_consts, body_consts, carry = while_parts(params, args)
        go_on = lambda carried: self.run({}, params["cond_jaxpr"], [*cond_consts, *carried[0]], ())[0][0]
        body = lambda carried: self.run(entry.plans[0], params["body_jaxpr"], [*body_consts, *carried[0]], carried[1])
        return jax.lax.while_loop(go_on, body, (carry, state))

    def _scan(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        params = eqn.params
        consts, carry, xs = scan_parts(params, args)
        num_carry = len(carry)

        def step(carried: tuple[list[Any], Any], slices: list[Any]) -> tuple[tuple[list[Any], Any], list[Any]]:
            carry, state = carried
            outs, state = self.run(entry.plans[0], params["jaxpr"], [*consts, *carry, *slices], state)
            return (outs[:num_carry], state), outs[num_carry:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        (carry, state), ys = jax.lax.scan(step, (carry, state), xs, **options)
        return [*carry, *ys], state

    def _unrolled(self, entry: Inner, eqn: Any, args: list[Any], state: Any) -> tuple[list[Any], Any]:
        consts, carry, xs = scan_parts(eqn.params, args)
        rows: dict[int, list[Any]] = {}
        for step, plan in zip(scan_steps(eqn.params), entry.plans, strict=True):
            slices = [jax.lax.index_in_dim(x, step, keepdims=False) for x in xs]
            outs, state = self.run(plan, eqn.params["jaxpr"], [*consts, *carry, *slices], state)
            carry, rows[step] = outs[: len(carry)], outs[len(carry) :]
        ys = zip(*(rows[step] for step in sorted(rows)), strict=True)
        return [*carry, *(jnp.stack(y) for y in ys)], state


def _called(eqn: Any) -> Any:
    return eqn.params[CALLS[eqn.primitive.name][1]]


def bind(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The equation's own outputs."""
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]
