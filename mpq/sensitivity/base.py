"""What all metrics share: their interface, the quantization errors they score, and the checks on what they return."""

import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import sums_over_documents
from mpq.evaluate import distributions, require_labels, require_outputs, row_divergence
from mpq.files import digest_json
from mpq.finite import all_finite
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.store import Store, kept
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.tracing.digest import jaxpr_digest
from mpq.types import MpqError, Params, QTensor, Scheme, SensitivityTable, WeightSpec


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name."""
        ...


class CandidateSource(Protocol):
    """Quantized weights by weight and scheme: `mpq.quantize.Candidates`."""

    @property
    def quantizer(self) -> Named:
        """The rounding algorithm."""
        ...

    def qtensor(self, spec: WeightSpec, scheme: Scheme) -> QTensor:
        """The quantized weight; asked for again, it has the same bits."""
        ...

    def dequantized(self, spec: WeightSpec, scheme: Scheme) -> jax.Array:
        """What it stands for, `float32[batch, k, n]`."""
        ...

    def digest(self, spec: WeightSpec, scheme: Scheme) -> str:
        """Of the values, or of all that they are made of: equal digests, equal values."""
        ...


class Coupling(enum.Flag):
    """What an entry of the table depends on beside its own weight's candidate at its own scheme."""

    NONE = 0
    FACTOR = enum.auto()
    """One factor that is common to the whole table, measured on a plan of the table's weights and schemes."""
    ROW = enum.auto()
    """The other schemes of the weight."""
    COLUMN = enum.auto()
    """The other weights at the scheme."""


class Metric(Protocol):
    """A frozen dataclass of options that predicts the loss increase of every (weight, scheme) pair.

    Laws: nats per output (token of text, image, sentence); 0 with stderr 0 where the candidate equals the weight; the
    same key gives the same table; an entry depends on its own candidate and on what `coupling` says, on nothing else;
    independent of the batch size up to rounding; padding never counts.
    """

    @property
    def name(self) -> str:
        """Key in `METRICS`."""
        ...

    @property
    def coupling(self) -> Coupling:
        """What an entry depends on beside its own candidate: what a table of fewer weights or schemes changes."""
        ...

    def __call__(
        self,
        model: Model,
        traced: Trace,
        schemes: Sequence[Scheme],
        candidates: CandidateSource,
        data: Dataset,
        *,
        key: jax.Array,
        batch_size: int,
        store: Store | None = None,
    ) -> SensitivityTable:
        """Score every weight at every scheme."""
        ...


def check_inputs(model: Model, weights: Sequence[WeightSpec], data: Dataset) -> np.ndarray:
    """Refuse what no metric can score.

    Returns:
      `float64[D]`: outputs that count in every document.

    Raises:
      MpqError: no output counts, or a weight holds NaN or infinity.
    """
    counts = require_outputs(model.task, data)
    for spec in weights:
        if not all_finite(model.params[spec.param][spec.where]):
            raise MpqError(f"weight {spec.path} holds NaN or infinity: mend the checkpoint before analysing it")
    return sums_over_documents(counts, data.document)


def has_targets(model: Model, data: Dataset) -> bool:
    """Whether the task finds in the data what a loss compares outputs with.

    Raises:
      MpqError: a label is no class of the model.
    """
    require_labels(model, model.params, data)
    return model.task.targets(data.inputs[:1], None if data.labels is None else data.labels[:1]) is not None


def require_targets(metric: str, model: Model, data: Dataset) -> None:
    """Refuse data whose outputs have nothing to be compared with.

    Raises:
      MpqError: the task or the data has no targets, or a label is no class of the model.
    """
    if not has_targets(model, data):
        raise MpqError(
            f"metric {metric} compares outputs with targets, which {data.source} does not have for task "
            f"{model.task.name}: give data with a label for every output, or use kl or fisher, which need none"
        )


def output_losses(
    apply: Callable[[Params, jax.Array], jax.Array], task: Task, params: Params, batch: Batch
) -> jax.Array:
    """The loss whose Hessian is taken, of every output: `[batch, ...]` nats.

    At the data's targets; without any it is the divergence from the model's own outputs, whose Hessian is the
    Gauss-Newton matrix.
    """
    q = distributions(apply, task, params, batch.inputs)
    targets = task.targets(batch.inputs, batch.labels)
    if targets is not None:
        return task.loss(q, targets)
    # A divergence takes NaN for a class of probability 0; this is 0 otherwise, and so are its derivatives.
    broken = jnp.sum(jnp.where(jnp.isnan(q), q, 0.0), axis=-1)
    return task.divergence(jax.lax.stop_gradient(q), q) + broken


def random_scores(task: Task, outputs: jax.Array, windows: jax.Array, key: jax.Array) -> jax.Array:
    """Vectors of the outputs' shape whose second moment is the Fisher matrix of every output; by random signs.

    Args:
      task: gives the root of the Fisher matrix.
      outputs: `[windows, ...]`.
      windows: their numbers in the data; the signs of window w use only `fold_in(key, w)`.
      key: of the draw.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, windows)
    signs = jax.vmap(lambda k: jax.random.rademacher(k, outputs.shape[1:], outputs.dtype))(keys)
    return task.fisher_root(outputs, signs)


def by_size(weights: Sequence[WeightSpec], schemes: Sequence[Scheme]) -> list[int]:
    """Columns of the table, the scheme first whose plan of all weights is smallest; in whatever order they come."""
    return sorted(range(len(schemes)), key=lambda c: (sum(w.size_bits(schemes[c]) for w in weights), str(schemes[c])))


def measured_on(model: Model, traced: Trace, data: Dataset, batch_size: int) -> dict[str, Any]:
    """What every item depends on for which the whole model runs over the data: a part of its key (`mpq.store.kept`).

    The batch size is in it because it decides the last bits. The model's function counts as what it computes, and the
    task by its options and its divergence; labels belong to the data.
    """
    task = model.task
    divergence = jax.make_jaxpr(lambda z: task.divergence(task.distribution(z), task.distribution(z)))(traced.output)
    return {
        "model": model.digest,
        "function": traced.digest,
        "task": [task.name, jaxpr_digest(divergence)],
        "data": data.digest,
        "batch_size": batch_size,
    }


def candidates_digest(weights: Sequence[WeightSpec], schemes: Sequence[Scheme], candidates: CandidateSource) -> str:
    """Of every candidate, in this order: in the key of an item that depends on them all, or whose bits do."""
    return digest_json([[w.path, str(s), candidates.digest(w, s)] for w in weights for s in schemes])


def half_mean_square(
    params: Params, spec: WeightSpec, schemes: Sequence[Scheme], candidates: CandidateSource
) -> np.ndarray:
    """`float64[schemes]`: ||delta||^2 / (2 n), over the n elements of the weight.

    Raises:
      MpqError: a candidate is not finite.
    """
    errors = quantization_error(params, spec, schemes, candidates)
    return np.square(np.asarray(errors), dtype=np.float64).mean(axis=(1, 2, 3)) / 2


def substituted_all(
    params: Params, weights: Sequence[WeightSpec], scheme: Scheme, candidates: CandidateSource
) -> dict[str, jax.Array]:
    """`params` with every weight replaced by its candidate at `scheme`."""
    replace = lambda changed, spec: spec.write(changed, candidates.dequantized(spec, scheme))
    return functools.reduce(replace, weights, dict(params))


def window_divergences(model: Model, params: Params, pairs: Iterable[tuple[Batch, jax.Array]]) -> np.ndarray:
    """Sum of KL(original || `params`) over the outputs of each window that count.

    Args:
      model: gives the function and the task.
      params: what to measure.
      pairs: batches, each with the distributions of the original's outputs: `Reference.batches`.

    Returns:
      `float64[windows]`, nats, rows that only fill up a batch included; NaN or infinite where the outputs are.
    """
    sums = [
        row_divergence(model.apply, model.task, params, batch.inputs, model.task.counted(batch.mask), p)
        for batch, p in pairs
    ]
    return np.concatenate([np.asarray(s, np.float64) for s in sums])


def quantization_error(
    params: Params, spec: WeightSpec, schemes: Sequence[Scheme], candidates: CandidateSource
) -> jax.Array:
    """Candidate minus weight.

    Returns:
      `float32[schemes, batch, k, n]`.

    Raises:
      MpqError: a candidate holds NaN or infinity.
    """
    made = [candidates.dequantized(spec, s) for s in schemes]
    errors, finite = _differences(spec.to_matrix(params[spec.param]), made)
    if not np.asarray(finite).all():
        raise MpqError(
            f"weight {spec.path} holds NaN or infinity when stored as {schemes[int(np.argmin(finite))]}: "
            "its values leave the range of the format or of its scale; leave this scheme out"
        )
    return errors


def squared_errors(
    params: Params,
    spec: WeightSpec,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    store: Store | None = None,
) -> np.ndarray:
    """`float64[schemes]`: ||candidate - weight||^2, an item each. Raises as `quantization_error` does."""

    def make(scheme: Scheme) -> float:
        error = quantization_error(params, spec, [scheme], candidates)
        return float(np.square(np.asarray(error), dtype=np.float64).sum())

    keep = lambda s: kept(store, lambda: make(s), item="squared_error", candidate=candidates.digest(spec, s))
    return np.array([keep(scheme) for scheme in schemes])


@jax.jit
def _differences(weight: jax.Array, candidates: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Errors, and `bool[schemes]`: which are finite; where they are computed, for they are large."""
    errors = jnp.stack(candidates) - weight
    return errors, jnp.isfinite(errors).all(axis=(1, 2, 3))


def make_table(
    metric: str,
    model: Model,
    weights: Sequence[WeightSpec],
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    loss_increase: np.ndarray,
    stderr: np.ndarray,
) -> SensitivityTable:
    """The table, after a check that every entry is finite. A standard error may be NaN: unknown, from one document.

    Raises:
      MpqError: a loss increase is NaN or infinite; names the weight and the scheme.
    """
    require_finite_entries(loss_increase, weights, schemes)
    return SensitivityTable(
        weights=tuple(weights),
        schemes=tuple(schemes),
        loss_increase=np.asarray(loss_increase, np.float64),
        stderr=np.asarray(stderr, np.float64),
        metric=metric,
        quantizer=candidates.quantizer.name,
        model_digest=model.digest,
        data_digest=data.digest,
    )


def require_finite_entries(values: np.ndarray, weights: Sequence[WeightSpec], schemes: Sequence[Scheme]) -> None:
    """Raise if an entry of a table is NaN or infinite.

    Raises:
      MpqError: names the weight and the scheme.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise MpqError(
            f"the loss increase of weight {weights[row].path} at {schemes[column]} is {values[row, column]}: "
            "the candidate leaves the range of float32; leave this scheme out"
        )
