"""A model cut at its weights: what weights read, as a function of what weights give.

Between two weights lie norms, attention, gates, sums: few operations, which no weight has a part in. With the outputs
of all weights given in place of those they would compute, every such piece can be looked at by itself, whatever the
weights are: run with any outputs and any other parameters, and followed to see what depends on what.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.trace import Default, Site, Trace
from mpq.tracing.follow import opened
from mpq.tracing.walk import CALLS
from mpq.types import Params

POSITIONS = 16
"""Tokens of text that a piece is run on."""

Outputs = tuple[jax.Array, ...]
"""What every site of a trace gives, in their order, each of the shape and dtype that the model expects."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one value depends on, without a weight between.

    Attributes:
      sites: numbers of the sites in the trace.
      params: paths of parameters that are no weights.
    """

    sites: frozenset[int]
    params: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A model between its weights.

    Attributes:
      traced: for the inputs here.
      inputs: one window.
      values: name -> the first site that reads it; lookups read indices and no value.
      free: paths of the parameters that are no weights.
    """

    traced: Trace
    inputs: jax.Array
    values: dict[str, Site]
    free: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, traced: Trace, data: Dataset) -> "Cut":
        """Of a model, on the first window of `data`, `POSITIONS` tokens of it if it is text."""
        inputs = jnp.asarray(data.inputs[:1])
        if isinstance(model.inputs, Tokens):
            inputs = inputs[:, :POSITIONS]
        traced = traced.on(inputs.shape)  # values have other names at other shapes
        values: dict[str, Site] = {}
        for site in traced.sites:
            if site.use.kind != "embedding":
                values.setdefault(site.use.input, site)
        covered: dict[str, int] = {}
        for spec in traced.weights:
            covered[spec.param] = covered.get(spec.param, 0) + spec.size
        free = [p for p, s in traced.params.items() if math.prod(s.shape) > covered.get(p, 0)]
        return cls(
            traced, inputs, values, tuple(p for p in free if jnp.issubdtype(traced.params[p].dtype, jnp.floating))
        )

    def random_outputs(self, seed: int) -> Outputs:
        """Normal numbers in place of what the weights give."""
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.normal(size=s.output.shape), s.output.dtype) for s in self.traced.sites)

    def matrix(self, number: int, outputs: Outputs) -> np.ndarray:
        """The output of site `number`, `float64[batch, tokens, features]`: of a lookup the rows that it finds."""
        return np.asarray(self.traced.sites[number].outputs_matrix(outputs[number]), np.float64)

    def with_matrix(self, number: int, outputs: Outputs, matrix: np.ndarray) -> Outputs:
        """`outputs` with another `[batch, tokens, features]` at site `number`."""
        site = self.traced.sites[number]
        new = site.from_outputs_matrix(jnp.asarray(matrix, site.output.dtype))
        return (*outputs[:number], new, *outputs[number + 1 :])

    def reads(self, params: Params, outputs: Outputs) -> dict[str, np.ndarray]:
        """Value -> `float32[batch, tokens, k]`."""
        return {name: np.asarray(x) for name, x in _reads(self, dict(params), outputs)[0].items()}

    def needs(self, params: Params, outputs: Outputs) -> tuple[dict[str, Needs], Needs]:
        """Of every value, and of what the model returns: by the operations that lead there, whatever they compute."""
        free = {path: params[path] for path in self.free}
        run = lambda outputs, free: run_cut(self, {**params, **free}, outputs)
        jaxpr = jax.make_jaxpr(run)(outputs, free)
        count, paths = len(outputs), sorted(free)  # JAX flattens a dictionary by its keys
        found = [
            Needs(frozenset(i for i in hit if i < count), frozenset(paths[i - count] for i in hit if i >= count))
            for hit in _sources(jaxpr, [frozenset([i]) for i in range(count + len(paths))])
        ]
        ends = found[len(self.values) :]
        whole = Needs(frozenset().union(*(e.sites for e in ends)), frozenset().union(*(e.params for e in ends)))
        by_name = dict(zip(sorted(self.values), found, strict=False))
        return {name: by_name[name] for name in self.values}, whole


def run_cut(cut: Cut, params: Params, outputs: Outputs) -> tuple[dict[str, jax.Array], Sequence[jax.Array]]:
    """What weights read, and the model's outputs."""
    numbers = {site.id: number for number, site in enumerate(cut.traced.sites)}

    def give(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        return outputs[numbers[site.id]]

    def look(site: Site, x: jax.Array, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        name = site.use.input
        if cut.values.get(name) is not site:
            return state
        return state | {name: site.inputs_matrix(x).astype(jnp.float32)}

    start = {name: jnp.zeros(site.matrix_shape, jnp.float32) for name, site in cut.values.items()}
    output, reads = cut.traced.accumulate(params, cut.inputs, start, look, replace=give)
    return reads, jax.tree.leaves(output)


_reads = jax.jit(run_cut, static_argnums=0)


def _sources(sub: Any, given: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """What the outputs of a jaxpr are made of, from what its inputs are. A loop or a branch mixes all that it reads."""
    jaxpr, _ = opened(sub)
    env: dict[Any, frozenset[int]] = dict.fromkeys(jaxpr.constvars, frozenset())
    env.update(zip(jaxpr.invars, given, strict=True))
    of = lambda v: frozenset() if isinstance(v, core.Literal) else env[v]
    for eqn in jaxpr.eqns:
        read = [of(v) for v in eqn.invars]
        inner = eqn.params.get(CALLS[eqn.primitive.name][1]) if eqn.primitive.name in CALLS else None
        if inner is not None and len(opened(inner)[0].invars) == len(read):
            outs = _sources(inner, read)
        else:
            outs = [frozenset().union(*read)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [of(v) for v in jaxpr.outvars]
