"""Quality of a model on held-out data: the task's own measure, KL to a reference and agreement, with standard errors.

For every output that counts, with q the model's and p the reference's distribution as the task defines them:

    nll = loss(q, target)       kl = KL(p || q)       agree = agreement(p, q)

in nats and from float32 outputs; for text, -log q(next token), KL over the vocabulary, and equal most likely tokens.
The device returns sums per row of the data; rows are added up per document on the host in float64, so no number depends
on the batch size. Padding, and rows that only fill up a batch, never count.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, paired_difference, sums_over_documents
from mpq.eval_result import EvalResult
from mpq.finite import all_finite
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.tasks import Task
from mpq.types import MpqError, Params

Apply = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentScores:
    """Sums over the outputs of each document: all that summaries and paired comparisons need.

    Attributes:
      task: whose loss, KL and quality they are.
      document: `int[D]`, numbers of the documents, ascending.
      counts: `float64[D]`, outputs that count.
      nll: `float64[D]`, nats; None where the task or the data has no targets.
      kl: `float64[D]`, nats, KL(reference || model); None without a reference.
      agree: `float64[D]`; None without a reference.
      evidence: `float64[D]`, what the task's quality is made of.
      labels: `[D, ...]`, of the documents' first rows, or None.
      data_digest: of the dataset.
    """

    task: Task
    document: np.ndarray
    counts: np.ndarray
    nll: np.ndarray | None
    kl: np.ndarray | None
    agree: np.ndarray | None
    evidence: np.ndarray
    labels: np.ndarray | None
    data_digest: str

    def summary(self) -> EvalResult:
        """Means per output with standard errors over documents."""

        def mean(sums: np.ndarray | None) -> tuple[float | None, float | None]:
            if sums is None:
                return None, None
            value, stderr = mean_over_documents(sums, self.counts)
            return float(value), float(stderr)

        quality = self.task.quality(self.evidence, self.counts, self.labels)
        (nll, nll_stderr), (kl, kl_stderr), (agree, agree_stderr) = map(mean, (self.nll, self.kl, self.agree))
        return EvalResult(
            quality_name=self.task.quality_name,
            quality=quality.value,
            quality_stderr=quality.stderr,
            nll=nll,
            nll_stderr=nll_stderr,
            kl=kl,
            kl_stderr=kl_stderr,
            agreement_name=self.task.agreement_name,
            agreement=agree,
            agreement_stderr=agree_stderr,
            num_documents=int((self.counts > 0).sum()),
            num_outputs=int(self.counts.sum()),
            data_digest=self.data_digest,
        )

    def difference(self, other: "DocumentScores", quantity: str = "kl") -> tuple[float, float]:
        """`self - other` in nats (or agreement) per output, paired by document.

        Args:
          other: scores of another model on the same dataset.
          quantity: `nll`, `kl` or `agree`.

        Returns:
          `(mean, stderr)`; negative: `self` is smaller.

        Raises:
          MpqError: the datasets differ, or a side has no such quantity.
        """
        if self.data_digest != other.data_digest:
            raise MpqError(
                f"scores of other datasets ({self.data_digest[:12]} and {other.data_digest[:12]}) cannot be paired: "
                "score both models on the same one"
            )
        a, b = (getattr(s, quantity) if quantity in ("nll", "kl", "agree") else None for s in (self, other))
        if a is None or b is None:
            raise MpqError(
                f"no {quantity!r} in both scores: allowed is nll with labels, and with a reference kl and agree"
            )
        mean, stderr = paired_difference(a, b, self.counts)
        return float(mean), float(stderr)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Distributions of the unquantized model's outputs on one dataset, computed once for a series of `score` calls.

    They take 4 bytes a number: for text `num_windows * time * vocabulary * 4`; 64 windows of 256 tokens and 4096 words
    are 268 MB. Above `keep_bytes` nothing is kept and every call pays the reference's forward passes again.

    Attributes:
      model: whose `apply` is run.
      data: the dataset; `score` must be called with the same one.
      batch_size: windows per forward pass.
      params: of the reference; None: the model's own.
      keep_bytes: most memory to hold.
    """

    model: Model
    data: Dataset
    batch_size: int
    params: Params | None = None
    keep_bytes: int = 1 << 30

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Batch, jax.Array]]:
        """Batches `start` to `stop`, each with the distributions `float32[batch, ..., d]` of the reference's outputs.

        Raises:
          MpqError: the reference gives NaN.
        """
        if self.nbytes <= self.keep_bytes:
            yield from self._kept[start:stop]
        else:
            yield from self._computed(start, stop)

    @functools.cached_property
    def nbytes(self) -> int:
        """Memory that the distributions of all batches take."""
        shape = jax.ShapeDtypeStruct((self.batch_size, *self.data.inputs.shape[1:]), self.data.inputs.dtype)
        outputs = jax.eval_shape(self.model.apply, self._params, shape)
        return -(-len(self.data.inputs) // self.batch_size) * int(np.prod(outputs.shape)) * 4

    @property
    def _params(self) -> Params:
        return self.model.params if self.params is None else self.params

    def _computed(self, start: int, stop: int | None) -> Iterator[tuple[Batch, jax.Array]]:
        for batch in itertools.islice(self.data.batches(self.batch_size), start, stop):
            p = distributions(self.model.apply, self.model.task, self._params, batch.inputs)
            counted = self.model.task.counted(batch.mask)
            require_finite(np.asarray(nan_if_any(p, counted)), self._params, self.data.source)
            yield batch, p

    @functools.cached_property
    def _kept(self) -> list[tuple[Batch, jax.Array]]:
        return list(self._computed(0, None))


def score(
    model: Model,
    params: Params,
    data: Dataset,
    *,
    reference: Params | Reference | None = None,
    batch_size: int,
) -> DocumentScores:
    """Score `params` on every output of `data` that counts.

    One compiled function serves all parameters of equal shapes: a series of plans compiles once.

    Args:
      model: the function and the task; `model.params` play no role.
      params: what to score, such as the dequantized weights of a plan.
      data: held-out data.
      reference: parameters to compare with, or a `Reference` that keeps their outputs between calls; None: no KL.
      batch_size: rows per forward pass; with a `Reference`, its own is used.

    Returns:
      Sums per document.

    Raises:
      MpqError: no output counts, the labels do not fit the outputs, the `Reference` is of other data, or an output is
        NaN or infinite.
    """
    counts = require_outputs(model.task, data)
    require_labels(model, params, data)
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(model, data, batch_size, reference, keep_bytes=0)
    if reference is None:
        pairs = ((batch, None) for batch in data.batches(batch_size))
    elif reference.data.digest != data.digest:
        raise MpqError(
            f"the reference was made for {reference.data.source}, not for {data.source}: make one for this data"
        )
    else:
        pairs, batch_size = reference.batches(), reference.batch_size
    results: list[_Sums] = []
    for batch, p in track(pairs, "evaluate", -(-len(data.inputs) // batch_size)):
        counted = model.task.counted(batch.mask)
        results.append(jax.device_get(_row_sums(model.apply, model.task, params, batch, counted, p)))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64)[: len(data.inputs)], *results)
    for values in (rows.nll, rows.kl, rows.agree, rows.finite):
        if values is not None:
            require_finite(values, params, data.source)
    _, first = np.unique(data.document, return_index=True)
    return DocumentScores(
        model.task,
        np.unique(data.document),
        sums_over_documents(counts, data.document),
        *(None if v is None else sums_over_documents(v, data.document) for v in (rows.nll, rows.kl, rows.agree)),
        evidence=_by_document(rows.evidence, data.document),
        labels=None if data.labels is None else data.labels[first],
        data_digest=data.digest,
    )


def counts_of(task: Task, data: Dataset) -> np.ndarray:
    """`int[num_windows]`: outputs that count in every row."""
    counted = np.asarray(task.counted(data.mask))
    return counted.reshape(len(counted), -1).sum(axis=1)


def require_outputs(task: Task, data: Dataset) -> np.ndarray:
    """`counts_of`.

    Raises:
      MpqError: nothing counts.
    """
    counts = counts_of(task, data)
    if not counts.any():
        raise MpqError(f"{data.source} has no {task.unit} that counts: all of it is padding")
    return counts


def require_labels(model: Model, params: Params, data: Dataset) -> None:
    """Hold labels of classes against the number of classes.

    Raises:
      MpqError: a label is no class of the model.
    """
    if data.labels is None or model.task.name != "classification":
        return
    struct = jax.ShapeDtypeStruct(data.inputs[:1].shape, data.inputs.dtype)
    classes = jax.eval_shape(model.apply, params, struct).shape[-1]
    if data.labels.min() < 0 or data.labels.max() >= classes:
        raise MpqError(
            f"{data.source} has labels from {data.labels.min()} to {data.labels.max()}: the model has the {classes} "
            f"classes 0 to {classes - 1}"
        )


def require_finite(values: np.ndarray, params: Params, what: str) -> None:
    """Raise if anything in `values` is NaN or infinite; the message names the parameter at fault where there is one.

    Raises:
      MpqError: something is not finite.
    """
    if np.isfinite(values).all():
        return
    for path, param in params.items():
        if not all_finite(param):
            raise MpqError(
                f"weight {path} holds NaN or infinity: mend the checkpoint, or quantize this weight otherwise"
            )
    raise MpqError(
        f"the model gives NaN or infinite outputs on {what} although its weights are finite: use float32 compute"
    )


class _Sums(NamedTuple):
    """Of every row `float32[batch, ...]`; None where there is nothing to sum."""

    nll: Any
    kl: Any
    agree: Any
    evidence: Any
    finite: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def distributions(apply: Apply, task: Task, params: Params, inputs: jax.Array) -> jax.Array:
    """`float32[batch, ..., d]`: the distributions that the outputs stand for; for text, log-probabilities."""
    return task.distribution(apply(params, inputs))


@functools.partial(jax.jit, static_argnums=(0, 1))
def row_divergence(
    apply: Apply, task: Task, params: Params, inputs: jax.Array, counted: jax.Array, p: jax.Array
) -> jax.Array:
    """Sum of KL(reference || model) over the outputs of each row that count, nats.

    Args:
      apply: the model's function.
      task: what its outputs mean.
      params: its parameters.
      inputs: `[batch, ...]`.
      counted: `bool[batch, ...]`, `Task.counted`.
      p: `float32[batch, ..., d]`, from `distributions` of the reference.

    Returns:
      `float32[batch]`.
    """
    return sum_counted(task.divergence(p, distributions(apply, task, params, inputs)), counted)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_sums(apply: Apply, task: Task, params: Params, batch: Batch, counted: jax.Array, p: jax.Array | None) -> _Sums:
    """Sums over the outputs of each row that count; evidence that is a vector comes as it is."""
    q = distributions(apply, task, params, batch.inputs)
    targets = task.targets(batch.inputs, batch.labels)
    evidence = task.evidence(q, targets)
    return _Sums(
        nll=None if targets is None else sum_counted(task.loss(q, targets), counted),
        kl=None if p is None else sum_counted(task.divergence(p, q), counted),
        agree=None if p is None else sum_counted(task.agreement(p, q), counted),
        evidence=sum_counted(evidence, counted) if evidence.ndim < q.ndim else evidence,
        finite=sum_counted(jnp.where(jnp.isnan(q).any(axis=-1), jnp.nan, 0.0), counted),
    )


@jax.jit
def nan_if_any(p: jax.Array, counted: jax.Array) -> jax.Array:
    """NaN if the distribution of an output that counts holds one, else 0."""
    return jnp.where(jnp.any(jnp.isnan(p).any(axis=-1) & counted), jnp.nan, 0.0)


def sum_counted(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Sum over each row where `counted`; what stands elsewhere, NaN included, has no influence."""
    return jnp.sum(jnp.where(counted, values, 0.0).reshape(len(values), -1), axis=1)


def _by_document(evidence: np.ndarray, document: np.ndarray) -> np.ndarray:
    """`float64[D]`: sums; of vectors `[rows, d]` the inner product of each document's two, NaN where it has others."""
    if evidence.ndim == 1:
        return sums_over_documents(evidence, document)
    count = np.unique(document, return_counts=True)[1]
    if (count != 2).any():
        return np.full(len(count), np.nan)
    pairs = evidence[np.argsort(document, kind="stable")].reshape(len(count), 2, -1)
    return np.sum(pairs[:, 0] * pairs[:, 1], axis=-1)
