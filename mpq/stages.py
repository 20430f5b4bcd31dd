"""A traced model run in stages: up to the input of one site, then from there up to that of the next.

Whoever changes weights in the order in which they are read has to run the model on what has changed so far. In stages
that is one forward pass in all, where it would be one for every site: what the rest of the model needs of a stage is
kept, the stage itself is never run again, and the weights that a stage reads are arguments of that stage alone.

Cost: the compilation of every stage; memory for what crosses a cut, in a decoder the residual stream.
Fails on: sites inside a branch or a loop, which have no place in a row of stages: they are left out.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from mpq.trace import Replace, Site, Trace
from mpq.tracing.interpret import bind
from mpq.tracing.walk import CALLS
from mpq.types import Params

_MARK = "mpq.stages:"
"""Before the number of a site, the name of the value that is its input."""

Values = tuple[jax.Array, ...]
"""What crosses a cut, for one batch."""


class Stages:
    """A trace, cut before the inputs of sites.

    Attributes:
      sites: those that could be reached, in the order of execution; stage i ends at the input of site i.
    """

    def __init__(self, traced: Trace, sites: Iterable[Site]):
        """Find the cuts. Nothing is computed.

        Args:
          traced: for the shape of the batches.
          sites: where to stop; those inside a branch or a loop are left out.
        """
        wanted = {site.id: site for site in sites}
        marked = lambda site, x: checkpoint_name(x, f"{_MARK}{site.id}") if site.id in wanted else x
        closed = _flat(traced, lambda site, x, w, default: default(marked(site, x), w))
        self._constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self._names = sorted(traced.params)  # JAX flattens a dictionary by its keys
        parameters = closed.jaxpr.invars[: len(self._names)]
        equations = closed.jaxpr.eqns
        cuts = [(i, int(name.removeprefix(_MARK))) for i, name in enumerate(map(_name, equations)) if name]
        self.sites = tuple(wanted[number] for _, number in cuts)
        fixed = _independent(equations, {*parameters, *self._constants})
        live: Sequence[Any] = closed.jaxpr.invars[len(self._names) :]
        self._stages: list[_Stage] = []
        for start, stop in zip([0, *(i for i, _ in cuts)], [i for i, _ in cuts], strict=False):
            value = equations[stop].invars[0]
            later = {v for eqn in equations[stop:] for v in eqn.invars if not isinstance(v, core.Literal)}
            made = [*live, *(v for eqn in equations[start:stop] for v in eqn.outvars)]
            crossing = [v for v in dict.fromkeys(made) if v in later and v not in fixed]
            ends = [value, *crossing]
            own = [eqn for i, eqn in enumerate(equations[:stop]) if i >= start or set(eqn.outvars) <= fixed]
            self._stages.append(_Stage(parameters, live, ends, _needed(own, ends), self._constants))
            live = crossing

    def __len__(self) -> int:
        return len(self._stages)

    def start(self, inputs: jax.Array) -> Values:
        """What the first stage begins with."""
        return (inputs,)

    def run(self, number: int, params: Params, values: Values) -> tuple[jax.Array, Values]:
        """One stage: the input of its site, and what the next stage begins with."""
        stage = self._stages[number]
        return _run(stage, {i: params[self._names[i]] for i in stage.parameters}, values)


class _Stage:
    """Some equations; identity is equality, so that it can be static."""

    def __init__(
        self,
        parameters: Sequence[Any],
        live: Sequence[Any],
        ends: Sequence[Any],
        equations: Sequence[Any],
        constants: Mapping[Any, Any],
    ):
        read = {v for eqn in equations for v in eqn.invars if not isinstance(v, core.Literal)} | set(ends)
        self.parameters = [i for i, v in enumerate(parameters) if v in read]
        self.variables = {i: parameters[i] for i in self.parameters}
        self.live, self.ends, self.equations = live, ends, equations
        self.constants = {v: constant for v, constant in constants.items() if v in read}


@functools.partial(jax.jit, static_argnums=0)
def _run(stage: _Stage, params: dict[int, jax.Array], values: Values) -> tuple[jax.Array, Values]:
    env = dict(stage.constants) | dict(zip(stage.live, values, strict=True))
    env |= {stage.variables[i]: param for i, param in params.items()}
    value, *crossing = _evaluated(stage.equations, env, stage.ends)
    return value, tuple(crossing)


def _flat(traced: Trace, replace: Replace) -> Any:
    """The jaxpr of the model without calls and rematerialized blocks, which mean nothing in a forward pass."""
    outer = jax.make_jaxpr(functools.partial(traced.evaluate, replace=replace))(traced.params, traced.inputs)
    inlined = lambda *args: _inlined(outer.jaxpr, outer.consts, jax.tree.leaves(args))
    return jax.make_jaxpr(inlined)(traced.params, traced.inputs)


def _inlined(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    return _evaluated(jaxpr.eqns, env, jaxpr.outvars)


def _evaluated(equations: Sequence[Any], env: dict[Any, Any], ends: Sequence[Any]) -> list[Any]:
    """Values of the ends after the equations, whose variables `env` is filled with."""
    value = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    for eqn in equations:
        how, inner = CALLS.get(eqn.primitive.name, ("", ""))
        operands = [value(v) for v in eqn.invars]
        outs = _inlined(eqn.params[inner], (), operands) if how == "remat" else bind(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [value(v) for v in ends]


def _name(eqn: Any) -> str:
    """The mark that an equation makes, or nothing."""
    name = eqn.params.get("name", "") if eqn.primitive.name == "name" else ""
    return name if name.startswith(_MARK) else ""


def _independent(equations: Sequence[Any], known: set[Any]) -> set[Any]:
    """Variables that no input reaches: functions of parameters, which may have changed when they are needed."""
    found = set(known)
    for eqn in equations:
        if all(isinstance(v, core.Literal) or v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _needed(equations: Sequence[Any], ends: Iterable[Any]) -> list[Any]:
    """Those that the ends depend on."""
    wanted, kept = set(ends), []
    for eqn in reversed(equations):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return kept[::-1]
