"""What can be quantized beside weights: the inputs of matmuls and convolutions, and the KV cache.

Rows of an activation table come from the trace. An *activation* is a value that weights multiply; weights that read the
same value (q/k/v, gate/up) share it and are one row, by the identity of the value in the trace. Convolutions that see
one value through different windows (the first of a residual block and its shortcut) count as readers of two values.

The *KV cache* is one row for every key and every value projection: what their matmul gives. Keys are therefore rounded
before the rotary embedding, as KVQuant does (Hooper et al. 2024, arXiv:2401.18079): rotation mixes pairs of channels
and spreads outliers. A bias and a norm of the keys, where a family has them, likewise come after: a cache of this kind
applies them when it is read. Unlike KVQuant's, whose keys share a scale along a channel, scales are one for every head
and token, which a cache that grows by a token needs no other token for.

Fails on: queries, keys and values fused into one weight (GPT-2, Phi-3, Pythia): its output is not all cache, and such
a weight is refused.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from mpq.activations.scheme import ActivationScheme
from mpq.trace import Default, Replace, Site, Trace
from mpq.tracing.follow import opened
from mpq.tracing.found import group_name
from mpq.types import MpqError

KEYS_AND_VALUES = r"(.*\.)?[kv]_proj\.kernel"
"""Paths of the key and value projections in the decoder families that keep them apart."""

_MARK = "mpq cache "
_KEEPING = {"add", "convert_element_type", "copy", "name", "sharding_constraint"}  # a bias, a cast: the same features


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """A value that can be rounded while the model runs.

    Attributes:
      path: unique name: of the weights that read it, `layers.0.self_attn.{q,k,v}_proj.kernel`; of the cache, that of
        the projection.
      kind: `activation` or `kv`.
      at: where it is: `Use.input` of its readers; of the cache, the path of the projection.
      weights: paths of the weights that read it; of the cache, of the projection.
      batch, width: a position has `batch` vectors of `width` values; `batch` is 1 but for stacked experts.
      heads: parts of `width`, attention heads of the cache; 0 if it has none.
    """

    path: str
    kind: str
    at: str
    weights: tuple[str, ...]
    batch: int
    width: int
    heads: int

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after JSON has made a list of the tuple."""
        return cls(**{**body, "weights": tuple(body["weights"])})

    @property
    def values(self) -> int:
        """Values a token; of a convolution, a position of its input."""
        return self.batch * self.width

    def size_bits(self, scheme: ActivationScheme) -> int:
        """Bits a token under `scheme`, scales and zero points included: of the cache, what a token of context takes.

        A scale of granularity `tensor` is one a window, and counts nothing.
        """
        groups = {"token": 1, "head": self.heads, "tensor": 0}
        groups |= {"group": -(-self.width // scheme.group_size)} if scheme.group_size else {}
        return scheme.size_bits(self.values, self.batch * groups[scheme.granularity])


def activation_rows(traced: Trace) -> tuple[ActivationSpec, ...]:
    """The inputs of the traced weights, in the order of execution; indices of embeddings are none.

    Args:
      traced: for inputs of any shape.

    Returns:
      One row for every value that weights multiply.
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    readers: dict[str, list[str]] = {}

    def look(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if site.use.kind != "embedding":
            shapes[site.use.input] = site.value_view(x.shape).shape
            paths = readers.setdefault(site.use.input, [])
            paths += [site.spec.path] if site.spec.path not in paths else []
        return default(x, w)

    jax.eval_shape(lambda params, x: traced.evaluate(params, x, look), dict(traced.params), traced.inputs)
    names, rows = collections.Counter[str](), []
    for at, paths in readers.items():
        name = group_name(paths)
        names[name] += 1
        batch, _, width = shapes[at]
        path = name if names[name] == 1 else f"{name}#{names[name]}"
        rows.append(ActivationSpec(path, "activation", at, tuple(paths), batch, width, heads=0))
    return tuple(rows)


def kv_rows(traced: Trace, pattern: str = KEYS_AND_VALUES, head_dim: int | None = None) -> tuple[ActivationSpec, ...]:
    """The cached keys and values, in the order of execution.

    Args:
      traced: for inputs of any shape.
      pattern: regular expression that the whole path of a key or value projection matches.
      head_dim: features of a head; None: as the model reshapes what the projection gives.

    Raises:
      MpqError: the pattern is no regular expression, or matches nothing; what it matches is no matmul, or reads its
        input alone, as a fused weight does; its heads are not found, or `head_dim` does not divide it.
    """
    try:
        chosen = {spec.path: spec for spec in traced.weights if re.fullmatch(pattern, spec.path)}
    except re.error as error:
        raise MpqError(
            f"{pattern!r} is no regular expression ({error}): write for instance {KEYS_AND_VALUES!r}"
        ) from None
    if not chosen:
        raise MpqError(
            f"no weight matches {pattern!r}: give a regular expression for the weights that make keys and values, of "
            f"{', '.join(spec.path for spec in traced.weights[:3])}, ...; fused ones are not supported"
        )
    members = collections.Counter(spec.group for spec in traced.weights)
    for path, spec in chosen.items():
        if spec.kind != "matmul" or members[spec.group] == 1:
            raise MpqError(
                f"{path} is no key or value projection: it is no matmul that shares its input with another weight; a "
                "weight that fuses queries, keys and values is not supported"
            )
    sizes = _head_dims(traced, chosen.keys()) if head_dim is None else dict.fromkeys(chosen, head_dim)
    rows = []
    for path, spec in chosen.items():
        size = sizes.get(path, 0)
        if size < 1 or spec.n % size:
            raise MpqError(
                f"the {spec.n} outputs of {path} fall into no heads of {size or 'a size that the model shows'}: give "
                "head-dim, the features of one head"
            )
        rows.append(ActivationSpec(path, "kv", path, (path,), spec.batch, spec.n, heads=spec.n // size))
    return tuple(rows)


def replacing(rows: Sequence[ActivationSpec], change: Callable[[int, jax.Array], jax.Array]) -> Replace:
    """What makes `Trace.evaluate` pass the value of every row through a function.

    Args:
      rows: the values.
      change: `(number of the row, value[batch, positions, width])` to what stands for it, of equal shape and dtype. It
        is called once for every reader.
    """
    inputs = {row.at: number for number, row in enumerate(rows) if row.kind == "activation"}
    outputs = {row.at: number for number, row in enumerate(rows) if row.kind == "kv"}

    def replace(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if site.use.kind != "embedding" and site.use.input in inputs:
            view = site.value_view(x.shape)
            x = view.invert(change(inputs[site.use.input], view(x)))
        y = default(x, w)
        if site.spec.path in outputs:
            y = site.from_outputs_matrix(change(outputs[site.spec.path], site.outputs_matrix(y)))
        return y

    return replace


def require_schemes(rows: Sequence[ActivationSpec], schemes: Sequence[ActivationScheme]) -> None:
    """Refuse a scale for every head where there are none, and features in floating point among those of a cache.

    Raises:
      MpqError: names the row and the scheme.
    """
    for scheme in schemes:
        if bare := [row.path for row in rows if scheme.granularity == "head" and not row.heads]:
            raise MpqError(f"{scheme} has a scale for every head, and {bare[0]} has no heads: use {scheme.of_tokens}")
        if cached := [row.path for row in rows if scheme.threshold and row.kind == "kv"]:
            raise MpqError(
                f"{scheme} leaves outliers in floating point, and the cache of {cached[0]} is of codes alone: use "
                f"{scheme.of_tokens}"
            )


def _head_dims(traced: Trace, paths: Any) -> dict[str, int]:
    """Features of a head, by path: the last axis that the model reshapes the output of a projection to."""
    found: dict[str, int] = {}

    def mark(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        y, path = default(x, w), site.spec.path
        if path not in paths:
            return y
        if site.output.shape[-1] < site.spec.n:  # the matmul itself gives an axis of heads
            found[path] = site.output.shape[-1]
        return checkpoint_name(y, _MARK + path)

    evaluate = lambda params, inputs: traced.evaluate(params, inputs, mark)
    _follow(jax.make_jaxpr(evaluate)(dict(traced.params), traced.inputs), found)
    return found


def _follow(jaxpr: Any, found: dict[str, int]) -> None:
    """Add to `found` the last axis of the first reshape of every marked value."""
    marked: dict[Any, str] = {}
    for eqn in opened(jaxpr)[0].eqns:
        for sub in core.jaxprs_in_params(eqn.params):
            _follow(sub, found)
        if (name := str(eqn.params.get("name", ""))).startswith(_MARK):
            marked[eqn.outvars[0]] = name.removeprefix(_MARK)
            continue
        path = next((marked[v] for v in eqn.invars if not isinstance(v, core.Literal) and v in marked), None)
        if path is not None and eqn.primitive.name in _KEEPING:
            marked[eqn.outvars[0]] = path
        elif path is not None and eqn.primitive.name == "reshape":
            before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            if len(after) > len(before) and math.prod(after[-2:]) == before[-1]:
                found.setdefault(path, after[-1])
