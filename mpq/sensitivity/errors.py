"""Quantization errors of many candidates, for the metrics that score all of them in one pass.

Such a pass wants every error at hand: S float32 copies of the model for S schemes. Of a small model that is what it
gets. Of a large one it gets what the candidates store, which is far smaller and there anyway (`mpq.quantize.Candidates`
makes it), their codes packed, and works errors out where they are contracted, some columns at a time: beside the model,
its candidates and the activations of a batch it then holds a quarter of the float32 weights. (And on a CPU, which turns
them to float32 before it takes columns, a copy of the model for every scheme of 16-bit floats.)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bits import pack_bits, unpack_bits
from mpq.formats import FORMATS
from mpq.quantize.widths import common
from mpq.sensitivity.base import CandidateSource, quantization_error
from mpq.trace import Trace
from mpq.types import Params, QTensor, Scheme, WeightSpec

SMALL = 2**26
"""Most values of errors that are held in float32."""


Select = Callable[[jax.Array], jax.Array]
"""Takes some columns, the same ones, from any array `[..., n]`."""


class WeightErrors(Protocol):
    """Candidates minus weight, of one weight: a pytree."""

    def __len__(self) -> int:
        """Number of candidates."""
        ...

    def matrices(self, select: Select | None = None) -> jax.Array:
        """`float32[candidates, batch, k, n]`, or of some output columns alone."""
        ...

    def columns_at_once(self, beside: int) -> int:
        """How many output columns may be worked on, where each takes `beside` more matrices than the errors."""
        ...


def looked_up(errors: WeightErrors, indices: jax.Array) -> jax.Array:
    """`float32[candidates, *indices.shape, k]`: of an embedding, the errors of the rows that are looked up."""
    rows = errors.matrices(lambda a: jnp.take(a, indices.reshape(-1), axis=-1))[:, 0].swapaxes(1, 2)
    return rows.reshape(len(errors), *indices.shape, -1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class DenseErrors:
    """`WeightErrors` as they are.

    Attributes:
      values: `float32[candidates, batch, k, n]`.
    """

    values: jax.Array

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.values)

    def matrices(self, select: Select | None = None) -> jax.Array:
        """The values, or some columns of them."""
        return self.values if select is None else select(self.values)

    def columns_at_once(self, beside: int) -> int:
        """All of them."""
        del beside
        return self.values.shape[-1]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["param", "stored"], meta_fields=["spec", "num_values"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class StoredErrors:
    """`WeightErrors` worked out when they are asked for.

    Attributes:
      param: the parameter array that holds the weight.
      stored: the candidates, `packed`.
      spec: static.
      num_values: static; so many may be held at once of errors and what they are contracted with.
    """

    param: jax.Array
    stored: tuple[QTensor, ...]
    spec: WeightSpec
    num_values: int

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.stored)

    def matrices(self, select: Select | None = None) -> jax.Array:
        """The candidates dequantized, minus the weight."""
        weight, stored = self.spec.to_matrix(self.param.astype(np.float32)), self.stored
        if select is not None:
            weight, stored = select(weight), [_columns(candidate, select) for candidate in stored]
        return _dequantized([_unpacked(candidate, self.spec.k) for candidate in stored]) - weight

    def columns_at_once(self, beside: int) -> int:
        """Half of them at most: what is worked out in a loop is not worked out before it."""
        of_column = (len(self) + beside) * self.spec.batch * self.spec.k
        return max(1, min(self.spec.n // 2, self.num_values // of_column))


def packed(candidate: QTensor) -> QTensor:
    """With codes as bytes full of bits, `uint8[batch, rows, n]`; values of a format without codes stay as they are.

    Columns that are encoded together become float16, which holds their levels: some of them alone have no codes.
    """
    if candidate.scheme.format.span > 1:
        values = candidate.grid.decode(candidate.qvalue).astype(jnp.float16)
        return dataclasses.replace(
            candidate, qvalue=values, scheme=dataclasses.replace(candidate.scheme, format=FORMATS["fp16"])
        )
    codes, of = np.asarray(candidate.qvalue), candidate.scheme.format
    if codes.dtype != np.int8:
        return candidate
    return dataclasses.replace(
        candidate, qvalue=jnp.asarray(pack_bits((codes - of.min_qvalue).astype(np.uint8), of.bits))
    )


def _unpacked(candidate: QTensor, k: int) -> QTensor:
    if candidate.qvalue.dtype != jnp.uint8:
        return candidate
    of = candidate.scheme.format
    codes = unpack_bits(candidate.qvalue, of.bits, k).astype(jnp.int16) + of.min_qvalue
    return dataclasses.replace(candidate, qvalue=codes.astype(jnp.int8))


def _columns(candidate: QTensor, select: Select) -> QTensor:
    """Some output columns; what the whole matrix shares stays."""
    n = candidate.qvalue.shape[-1]
    return jax.tree.map(lambda a: select(a) if a.shape[-1] == n else a, candidate)


def _dequantized(stored: Sequence[QTensor]) -> jax.Array:
    """`float32[candidates, batch, k, n]`; those that differ in their width alone are decoded in one operation."""
    alike: dict[Scheme, list[int]] = {}
    for index, candidate in enumerate(stored):
        alike.setdefault(common(candidate.scheme)[0], []).append(index)
    values = {}
    for scheme, members in alike.items():
        same = [dataclasses.replace(stored[index], scheme=scheme) for index in members]
        values |= zip(members, jax.tree.map(lambda *leaves: jnp.stack(leaves), *same).dequantize(), strict=True)
    return jnp.stack([values[index] for index in range(len(stored))])


Errors = Mapping[str, WeightErrors]
"""Errors by path; a weight all of whose candidates equal it has no entry."""


def differing_errors(
    params: Params, traced: Trace, schemes: Sequence[Scheme], candidates: CandidateSource
) -> tuple[np.ndarray, dict[str, WeightErrors]]:
    """Errors of the candidates that differ from their weight.

    Args:
      params: the original parameters.
      traced: gives the weights.
      schemes: columns.
      candidates: quantized weights.

    Returns:
      `bool[weights, schemes]`, which candidates differ; and path -> errors of those, of every weight that has one.

    Raises:
      MpqError: a candidate holds NaN or infinity.
    """
    total = sum(spec.size for spec in traced.weights)
    of_weight = _dense if total * len(schemes) <= SMALL else functools.partial(_stored, total // 4)
    keep, errors = np.zeros((len(traced.weights), len(schemes)), bool), {}
    for row, spec in enumerate(traced.weights):
        keep[row], error = of_weight(params, spec, schemes, candidates)
        if keep[row].any():
            errors[spec.path] = error
    return keep, errors


def _dense(
    params: Params, spec: WeightSpec, schemes: Sequence[Scheme], candidates: CandidateSource
) -> tuple[np.ndarray, WeightErrors]:
    error = quantization_error(params, spec, schemes, candidates)
    keep = _differs(error)
    return keep, DenseErrors(error if keep.all() else error[keep])


def _stored(
    num_values: int, params: Params, spec: WeightSpec, schemes: Sequence[Scheme], candidates: CandidateSource
) -> tuple[np.ndarray, WeightErrors]:
    keep = np.concatenate([_differs(quantization_error(params, spec, [s], candidates)) for s in schemes])
    differing = [scheme for scheme, differs in zip(schemes, keep, strict=True) if differs]
    stored = tuple(packed(candidates.qtensor(spec, scheme)) for scheme in differing)
    return keep, StoredErrors(params[spec.param], stored, spec, num_values)


def _differs(error: jax.Array) -> np.ndarray:
    return np.asarray(error.any(axis=(1, 2, 3)))
