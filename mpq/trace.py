"""Trace once, work on the jaxpr: find a model's weights, and evaluate the model with their matmuls replaced.

`trace` walks the jaxpr of a pure function and finds every parameter that reaches a `dot_general`, a
`conv_general_dilated` or an embedding `gather` through nothing but layout operations, inside `jit`,
rematerialization, custom derivatives, branches and loops. `Trace.evaluate` runs the same jaxpr with those operations
replaced. Both happen while JAX traces: a compiled evaluation costs what the replacements cost and nothing else. The
model's code is not touched, so any model will do.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from mpq.tracing import found
from mpq.tracing.digest import jaxpr_digest
from mpq.tracing.found import Skipped
from mpq.tracing.interpret import Interpreter
from mpq.tracing.layout import identity
from mpq.tracing.reads import Read, Slot, Source
from mpq.tracing.site import Site, sole_input
from mpq.tracing.walk import Plan, Walk
from mpq.types import MpqError, Params, WeightSpec

__all__ = ["Default", "Replace", "Site", "Skipped", "Trace", "sole_input", "trace"]

Default = Callable[[jax.Array, jax.Array], jax.Array]
Replace = Callable[[Site, jax.Array, jax.Array, Default], jax.Array]
Update = Callable[[Site, jax.Array, Any], Any]
Visit = Callable[[Site, jax.Array, jax.Array, Default, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A traced function: its weights, and its evaluation with their reads replaced.

    A trace is made for one shape of inputs and serves every batch of that shape; `on` makes one for another shape.

    Attributes:
      weights: in the order in which they are first read.
      skipped: every parameter that is not, or not in all its reads, among the weights, with the reason.
      sites: every operation that reads a weight, in the order of execution.
      scales: parameters that do nothing but multiply or divide activations, element by element.
      params: path -> shape and dtype of every parameter.
      inputs: shapes and dtypes of the inputs.
    """

    weights: tuple[WeightSpec, ...]
    skipped: tuple[Skipped, ...]
    sites: tuple[Site, ...]
    scales: frozenset[str]
    params: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(repr=False)
    inputs: Any = dataclasses.field(repr=False)
    _fn: Callable[[dict[str, jax.Array], Any], Any] = dataclasses.field(repr=False)
    _jaxpr: Any = dataclasses.field(repr=False)
    _plan: Plan = dataclasses.field(repr=False)
    _output: Any = dataclasses.field(repr=False)
    _split: frozenset[Slot] = dataclasses.field(default=frozenset(), repr=False)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what the function computes at these shapes, `mpq.tracing.digest`; of no parameter's values."""
        return jaxpr_digest(self._jaxpr)

    @property
    def output(self) -> Any:
        """Shapes and dtypes of what the function returns."""
        return self._output

    def evaluate(self, params: Params, inputs: Any, replace: Replace | None = None) -> Any:
        """The function's output, with reads of weights replaced.

        Pure: use it under `jit`, `grad` and `vmap` like the function itself. With `replace=None`, or one that returns
        `default(x, w)`, it is bit-identical to the function under `jit`; only gradients through a scan whose weights
        are scanned may be summed in another order, since that scan is unrolled. A function with a
        derivative rule of its own keeps the rule unless a read inside it was changed; then its body is differentiated
        as it stands. No value can be carried out of `replace` by a side effect: it may run inside a scan or a
        rematerialized block. `accumulate` is for that.

        Args:
          params: as traced: the same paths, shapes and dtypes.
          inputs: as traced: the same shapes and dtypes.
          replace: `(site, x, w, default) -> y`. `x` is the operation's input, `w` the weight, both as laid out and cast
            by the model; `default(x, w)` is the operation itself; `y` has its shape and dtype. For an embedding `x` is
            the integer indices and `y` the rows looked up.

        Returns:
          What the function returns.

        Raises:
          MpqError: if parameters, inputs or a replaced result differ from what was traced.
        """

        def visit(site: Site, x: jax.Array, w: jax.Array, default: Default, state: tuple[()]) -> tuple[jax.Array, Any]:
            return (default(x, w) if replace is None else replace(site, x, w, default)), state

        return self._run(params, inputs, visit, ())[0]

    def accumulate(
        self,
        params: Params,
        inputs: Any,
        state: Any,
        update: Update,
        after: Update | None = None,
        replace: Replace | None = None,
    ) -> tuple[Any, Any]:
        """The function's output, and `state` after every read of a weight has updated it.

        Args:
          params: as traced.
          inputs: as traced.
          state: a pytree of arrays.
          update: `(site, x, state) -> state` of the same structure, shapes and dtypes; called in the order of
            execution, in every step of a loop, and only in the branches that run.
          after: the same with the operation's output in place of its input, called next.
          replace: as for `evaluate`.

        Returns:
          `(output, state)`.

        Raises:
          MpqError: if parameters, inputs or a replaced result differ from what was traced.
        """

        def visit(site: Site, x: jax.Array, w: jax.Array, default: Default, state: Any) -> tuple[jax.Array, Any]:
            y, state = default(x, w) if replace is None else replace(site, x, w, default), update(site, x, state)
            return y, state if after is None else after(site, y, state)

        return self.carry(params, inputs, state, visit)

    def carry(self, params: Params, inputs: Any, state: Any, visit: Visit) -> tuple[Any, Any]:
        """The function's output and `state`, where a replacement of a read may depend on the state and change it.

        Args:
          params: as traced.
          inputs: as traced.
          state: a pytree of arrays.
          visit: `(site, x, w, default, state) -> (y, state)`, as `replace` of `evaluate` and `update` of `accumulate`.

        Returns:
          `(output, state)`.

        Raises:
          MpqError: if parameters, inputs or a replaced result differ from what was traced.
        """
        return self._run(params, inputs, visit, state)

    def on(self, shape: Sequence[int]) -> "Trace":
        """The same function traced for an input of another shape; `self` if the shape is the same.

        Args:
          shape: of the input, for instance `(batch, time)`; its dtype stays.

        Returns:
          A trace with the same weights; only their multiply-accumulates differ.

        Raises:
          MpqError: if the inputs are more than one array, or if the function reads its weights otherwise at this shape.
        """
        if not isinstance(self.inputs, jax.ShapeDtypeStruct):
            raise MpqError(f"`on` serves functions of one input array, not of {_show(self.inputs)}: trace again.")
        shape = tuple(shape)
        if shape == self.inputs.shape:
            return self
        if shape not in self._others:
            self._others[shape] = self._retraced(shape)
        return self._others[shape]

    @functools.cached_property
    def _others(self) -> dict[tuple[int, ...], "Trace"]:
        """Traces for other shapes, made once: what is compiled for a trace serves whoever asks for that shape again."""
        return {}

    def _retraced(self, shape: tuple[int, ...]) -> "Trace":
        other = _traced(self._fn, self.params, jax.ShapeDtypeStruct(shape, self.inputs.dtype), self._split)
        bare = lambda spec: dataclasses.replace(spec, uses=tuple(dataclasses.replace(use, macs=0) for use in spec.uses))
        if [*map(bare, self.weights)] != [*map(bare, other.weights)]:
            raise MpqError(
                f"The model reads its weights otherwise for {_show(other.inputs)} than for {_show(self.inputs)}: "
                "trace it for the shape that it will run on."
            )
        return other

    def split(self, paths: Iterable[str] | None = None) -> "Trace":
        """The same trace with one weight for every expert, so that each can have a scheme of its own.

        A stack of experts `params[path]` of shape `[experts, ...]`, multiplied in one operation, is one weight to
        `trace`: one scheme for all. Here it becomes `path[0]`, `path[1]`, ..., and its operation one site an expert
        with its own slice of the input, or with all of it where every expert sees every token. Weights of one expert
        that read the same input are a group; those of different experts never are.

        Args:
          paths: of the weights to divide; None: all whose experts have inputs of their own (`batch` > 1).

        Raises:
          MpqError: if a path is not a weight, or not a stack of experts along its first axis.
        """
        reads: dict[str, list[Read]] = {}
        for site in self.sites:
            reads.setdefault(site.spec.path, []).append(site._read)
        stacked = {path for path, of in reads.items() if all(read.stack is not None for read in of)}
        own_inputs = lambda read: any(f.axis == 0 for f in read.batch)
        chosen = {p for p in stacked if own_inputs(reads[p][0])} if paths is None else set(paths)
        for path in sorted(chosen - stacked):
            if path not in reads:
                raise MpqError(f"`{path}` is not one of the {len(self.weights)} weights of this trace.")
            raise MpqError(
                f"`{path}` cannot be divided into experts: that needs a first axis that is not contracted, of a weight "
                f"that only matmuls read; divisible are {sorted(stacked) or 'none'}."
            )
        split = self._split | {reads[path][0].slot for path in chosen}
        return self if split == self._split else _traced(self._fn, self.params, self.inputs, split)

    def _run(self, params: Params, inputs: Any, visit: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        args = self._checked(params, inputs)

        def visit_read(number: int, operands: list[Any], default: Callable[..., Any], state: Any) -> tuple[Any, Any]:
            site = self._by_read.get(number)
            if site is None:  # a read of a parameter that is refused as a weight
                return default(*operands), state
            read = site._read
            lookup = read.inputs is None
            x, w = operands[1 - read.operand], operands[read.operand]
            if lookup:
                x = x[..., 0]  # a gather takes vectors of indices; ours has one index a row

            def call(x_: Any, w_: Any) -> Any:
                # The very operands of the jaxpr where nothing was changed: `Interpreter` recognizes them.
                other = operands[1 - read.operand] if x_ is x else (x_[..., None] if lookup else x_)
                return default(*((w_, other) if read.operand == 0 else (other, w_)))

            y, state = visit(site, x, w, call, state)
            if (jnp.shape(y), jnp.result_type(y)) != (site.output.shape, site.output.dtype):
                raise MpqError(
                    f"A replacement for `{site.spec.path}` returned {_show(y)}; the model expects {_show(site.output)}."
                )
            return y, state

        outs, state = Interpreter(visit_read).run(self._plan, self._jaxpr, args, state)
        return jax.tree.unflatten(jax.tree.structure(self._output), outs), state

    @functools.cached_property
    def _by_read(self) -> dict[int, Site]:
        return {site.id: site for site in self.sites}

    def _checked(self, params: Params, inputs: Any) -> list[Any]:
        """The flat arguments of the jaxpr, if they are what was traced."""
        if params.keys() != self.params.keys():
            missing, extra = sorted(self.params.keys() - params.keys()), sorted(params.keys() - self.params.keys())
            raise MpqError(f"The parameters are not those that were traced: missing {missing}, not expected {extra}.")
        args = jax.tree.map(_array, ({name: params[name] for name in self.params}, inputs))
        structs = jax.tree.map(_struct, args)
        if structs[1] != self.inputs:
            raise MpqError(
                f"Traced for inputs {_show(self.inputs)}, evaluated on {_show(structs[1])}; `Trace.on` gives a trace "
                "for another shape."
            )
        for name, struct in self.params.items():
            if structs[0][name] != struct:
                raise MpqError(f"Parameter `{name}` was traced as {_show(struct)}, but is {_show(structs[0][name])}.")
        return jax.tree.leaves(args)


def trace(
    fn: Callable[[dict[str, jax.Array], Any], Any], params: Mapping[str, jax.Array | jax.ShapeDtypeStruct], inputs: Any
) -> Trace:
    """Find the weights of `fn`. Nothing is computed: shapes are enough, and no array is kept.

    Args:
      fn: `(params, inputs) -> output`, pure.
      params: path -> array or `ShapeDtypeStruct`.
      inputs: an array or a `ShapeDtypeStruct`, or a pytree of them.

    Returns:
      The trace, with multiply-accumulates counted for these inputs.

    Raises:
      MpqError: if a value of `params` is not an array, as in a nested dictionary.
    """
    for name, param in params.items():
        if not hasattr(param, "shape") or not hasattr(param, "dtype"):
            raise MpqError(
                f"Parameter `{name}` is a {type(param).__name__}, not an array: flatten the tree to {{path: array}}."
            )
    structs = {name: _struct(param) for name, param in params.items()}
    return _traced(fn, structs, jax.tree.map(_struct, inputs), frozenset())


def _traced(
    fn: Callable[[dict[str, jax.Array], Any], Any],
    structs: Mapping[str, jax.ShapeDtypeStruct],
    inputs: Any,
    split: frozenset[Slot],
) -> Trace:
    """The trace, with the experts of the stacks in `split` read one by one."""
    jaxpr, output = jax.make_jaxpr(fn, return_shape=True)(structs, inputs)
    walk = Walk(split)
    shapes = {name: struct.shape for name, struct in sorted(structs.items())}  # JAX flattens a dictionary by its keys
    sources = [Source(Slot(name, (), shape), identity(shape)) for name, shape in shapes.items()]
    sources += [walk.fresh(var) for var in jaxpr.jaxpr.invars[len(structs) :]]
    plan, _ = walk.jaxpr(jaxpr, sources, 1)
    specs, uses, skipped = found.weights(structs, walk.reads, walk.notes)
    sites = tuple(Site(i, specs[slot], use, walk.reads[i]) for i, (slot, use) in sorted(uses.items()))
    scales = found.scales(walk.reads, walk.notes)
    return Trace(tuple(specs.values()), skipped, sites, scales, structs, inputs, fn, jaxpr, plan, output, split)


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    dtype = jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(array.shape, dtype)


def _show(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(tree))
