"""Squares of the scores' projection on the quantization error: what `fisher` and `empirical_fisher` have in common.

A score is a gradient of a loss in the outputs. With e its pullback to a weight's output and x the weight's input,

    s_t = x_t^T delta e_t        loss_increase = 1 / (2 N) * sum over spans ( sum_{t in span} s_t )^2

for the actual error delta of every scheme, from one backward pass. What the scores are, sampled or of the data's
labels, is the metrics' own matter.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import require_finite
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import CandidateSource, Store, make_table, quantization_error
from mpq.tasks import Task
from mpq.trace import Site, Trace
from mpq.types import Params, Scheme, SensitivityTable

Taps = Mapping[str, jax.Array]
Scores = Callable[[Task, Batch, jax.Array, jax.Array, jax.Array], jax.Array]
"""`(task, batch, outputs, windows, key) -> scores` in the shape of the outputs; a function of a module, since what is
compiled is kept by it. `windows` are the rows' numbers in the data; the key differs between samples."""


def score_squares(
    name: str,
    label: str,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    counts: np.ndarray,
    scores: Scores,
    *,
    num_samples: int,
    span: int | None,
    key: jax.Array,
    batch_size: int,
    store: Store | None,
) -> SensitivityTable:
    """The quadratic form of every weight at every scheme.

    Args:
      name: of the metric, for the progress bar.
      label: of the table.
      model: gives the original parameters and the task.
      traced: the model's trace.
      schemes: columns.
      candidates: quantized weights.
      data: windows.
      counts: `[D]`, outputs that count in every document, from `check_inputs`.
      scores: gives the scores; they need not be zero where nothing counts.
      num_samples: how often scores are asked for; the squares are averaged.
      span: most positions that are summed before squaring; None: the whole window.
      key: sample m gets `fold_in(key, m)`.
      batch_size: windows per pass.
      store: finished items, one a batch.

    Raises:
      MpqError: a weight, a candidate or the model's outputs are not finite.
    """
    shaped = traced.on((batch_size, *data.inputs.shape[1:]))
    keep, errors = _errors(model.params, traced, schemes, candidates)
    squares = np.zeros((len(data.inputs), len(traced.weights), len(schemes)))
    starts = range(0, len(data.inputs), batch_size) if errors else ()
    batches = zip(starts, data.batches(batch_size), strict=False)
    of_batch = functools.partial(_squares, shaped, scores, num_samples, span, model.task, model.params, errors)
    for start, batch in track(batches, f"sensitivity {name}", len(starts)):
        stop = min(start + batch_size, len(data.inputs))
        values = None if store is None else store.get(f"{start}:{stop}")
        if values is None:
            sums = of_batch(batch, model.task.counted(batch.mask), np.arange(start, start + batch_size), key)
            values = _dense(jax.device_get(sums), traced, keep)[: stop - start].tolist()
            if store is not None:
                store.put(f"{start}:{stop}", values)
        squares[start:stop] = values
    if keep.any() and not np.isfinite(squares[:, keep]).any(axis=1).all():  # a window where every candidate fails
        require_finite(squares, model.params, data.source)
    mean, stderr = mean_over_documents(sums_over_documents(squares / 2, data.document), counts)
    stderr = np.where(keep, stderr, 0.0)  # an exact candidate costs nothing: that is certain
    return make_table(label, model, traced.weights, schemes, candidates, data, mean, stderr)


def _errors(
    params: Params, traced: Trace, schemes: Sequence[Scheme], candidates: CandidateSource
) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Which candidates differ from their weight, `bool[weights, schemes]`; the errors `[differing, ...]`."""
    keep = np.zeros((len(traced.weights), len(schemes)), bool)
    errors = {}
    for row, spec in enumerate(traced.weights):
        error = quantization_error(params, spec, schemes, candidates)
        keep[row] = np.asarray(error.any(axis=(1, 2, 3)))
        if keep[row].any():
            errors[spec.path] = error if keep[row].all() else error[keep[row]]
    return keep, errors


def _dense(sums: Mapping[str, np.ndarray], traced: Trace, keep: np.ndarray) -> np.ndarray:
    """`float64[windows, weights, schemes]` from one `[windows, schemes that differ]` a weight; 0 elsewhere."""
    dense = np.zeros((len(next(iter(sums.values()))), *keep.shape))
    for row, spec in enumerate(traced.weights):
        if spec.path in sums:
            dense[:, row, keep[row]] = sums[spec.path]
    return dense


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _squares(
    traced: Trace,
    scores: Scores,
    num_samples: int,
    span: int | None,
    task: Task,
    params: Params,
    errors: Taps,
    batch: Batch,
    counted: jax.Array,
    windows: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """For every weight `float32[windows, schemes]`: the mean over samples of sum over spans (sum_{t in span} s_t)^2.

    s is read off as a derivative: `taps[path][scheme, window, span]` scales an error x @ delta that is added to the
    weight's output, and the derivative at zero of the loss is the sum of s over the span. Uses of a weight share the
    tap. Where a row has a single output, all positions lead to it, and the span is the row.
    """
    num_windows = batch.inputs.shape[0]
    spans = 1 if span is None or counted.ndim == 1 else -(-batch.inputs.shape[1] // span)
    taps = {path: jnp.zeros((len(error), num_windows, spans)) for path, error in errors.items()}

    def outputs_of(taps: Taps) -> jax.Array:
        def tapped(site: Site, x: jax.Array, w: jax.Array, default: Callable[..., jax.Array]) -> jax.Array:
            path = site.spec.path
            y = default(x, w)
            return _tap(site, span == 1, y, x, errors[path], taps[path]) if path in taps else y

        return traced.evaluate(params, batch.inputs, replace=tapped).astype(jnp.float32)

    outputs, pullback = jax.vjp(outputs_of, taps)

    def one_sample(sample: jax.Array) -> dict[str, jax.Array]:
        score = scores(task, batch, outputs, windows, jax.random.fold_in(key, sample))
        s = pullback(jnp.where(counted[..., None], score, 0.0))[0]
        return {path: jnp.square(v).sum(axis=-1).T for path, v in s.items()}

    samples = jax.lax.map(one_sample, jnp.arange(num_samples))
    return {path: v.mean(axis=0) for path, v in samples.items()}


def _tap_primal(
    site: Site, by_position: bool, y: jax.Array, x: jax.Array, error: jax.Array, tap: jax.Array
) -> jax.Array:
    """`y + sum over schemes of tap * (x @ error)`, where only `tap = 0` is ever asked for: `y`.

    Written by hand because reverse mode would compute and keep `x @ error` of every scheme in the forward pass.
    """
    del site, by_position, x, error, tap
    return y


def _tap_forward(
    site: Site, by_position: bool, y: jax.Array, x: jax.Array, error: jax.Array, tap: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _tap_primal(site, by_position, y, x, error, tap), (x, error, tap)


def _tap_backward(
    site: Site, by_position: bool, saved: tuple[jax.Array, jax.Array, jax.Array], e: jax.Array
) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
    x, error, tap = saved
    out = _in_spans(site.outputs_matrix(e).astype(error.dtype), tap)
    if site.use.kind == "embedding":
        s = _of_lookup(_in_spans(x.reshape(1, -1, 1), tap)[0, ..., 0], error, out[0])
    else:
        rows = _in_spans(site.inputs_matrix(x).astype(error.dtype), tap)
        s = (_of_positions if by_position else _of_gradients)(rows, error, out)
    no_tangent = jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
    return e, no_tangent, jnp.zeros_like(error), s


_tap = jax.custom_vjp(_tap_primal, nondiff_argnums=(0, 1))
_tap.defvjp(_tap_forward, _tap_backward)


def _of_lookup(indices: jax.Array, error: jax.Array, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]`: of an embedding, the error of the row looked up times e, summed over a span.

    Args:
      indices: `int[windows, spans, time]`.
      error: `[schemes, 1, k, vocabulary]`.
      out: e, `[windows, spans, time, k]`.
    """
    rows = jnp.take(error[:, 0].swapaxes(1, 2), indices, axis=1)  # [schemes, windows, spans, time, k]
    return jnp.sum(rows * out, axis=(-2, -1))


def _of_positions(x: jax.Array, error: jax.Array, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]` by way of x @ error: for spans of one, which are smaller than their gradients."""
    return jnp.einsum("sbwptn,bwptn->swp", jnp.einsum("bwptk,sbkn->sbwptn", x, error), out)


def _of_gradients(x: jax.Array, error: jax.Array, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]` by way of the gradient x^T e of every span: one matmul serves all schemes.

    Window by window: the gradients of a window's spans take `spans * batch * k * n` values, whatever the batch size.
    """
    flat = error.reshape(len(error), -1).T

    def one_window(xe: tuple[jax.Array, jax.Array]) -> jax.Array:
        gradient = jnp.einsum("bptk,bptn->pbkn", *xe)
        return gradient.reshape(len(gradient), -1) @ flat

    s = jax.lax.map(one_window, (x.swapaxes(0, 1), out.swapaxes(0, 1)))
    return s.transpose(2, 0, 1)


def _in_spans(matrix: jax.Array, tap: jax.Array) -> jax.Array:
    """`[batch, windows * time, columns]` to `[batch, windows, spans, time, columns]`, filled up with zeros."""
    num_windows, spans = tap.shape[1:]
    windows = matrix.reshape(len(matrix), num_windows, -1, matrix.shape[-1])
    time = windows.shape[2]
    length = -(-time // spans)
    padded = jnp.pad(windows, [(0, 0), (0, 0), (0, spans * length - time), (0, 0)])
    return padded.reshape(len(matrix), num_windows, spans, length, -1)
