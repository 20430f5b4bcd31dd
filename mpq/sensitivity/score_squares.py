"""Squares of the scores' projection on the quantization error: what `fisher` and `empirical_fisher` have in common.

A score is a gradient of a loss in the outputs. With e its pullback to a weight's output and x the weight's input,

    s_t = x_t^T delta e_t        loss_increase = 1 / (2 N) * sum over spans ( sum_{t in span} s_t )^2

for the actual error delta of every scheme, from one backward pass. What the scores are, sampled or of the data's
labels, is the metrics' own matter.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store
from mpq.sensitivity.by_batch import table_of_windows, windows_by_batch
from mpq.sensitivity.errors import Errors, differing_errors
from mpq.sensitivity.taps import BY_GRADIENT, BY_POSITION, in_windows, tapped_vjp, telling_windows
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable

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
      label: of the table: the metric with all its options.
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
    shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
    keep, errors = differing_errors(model.params, traced, schemes, candidates)
    of_batch = functools.partial(_squares, shaped, scores, num_samples, span, model.task, model.params, errors, key)
    squares = windows_by_batch(
        f"sensitivity {name}",
        model,
        traced,
        schemes,
        candidates,
        keep,
        data,
        of_batch,
        batch_size=batch_size,
        store=store,
        inputs={"item": label, "key": jax.random.key_data(key).tolist()},
    )
    return table_of_windows(label, model, traced, schemes, candidates, data, counts, squares / 2, keep)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _squares(
    traced: Trace,
    scores: Scores,
    num_samples: int,
    span: int | None,
    task: Task,
    params: Params,
    errors: Errors,
    key: jax.Array,
    batch: Batch,
    counted: jax.Array,
    windows: jax.Array,
) -> dict[str, jax.Array]:
    """For every weight `float32[windows, schemes]`: the mean over samples of sum over spans (sum_{t in span} s_t)^2.

    Where a row has a single output, all positions lead to it, and the span is the row.
    """
    spans = 1 if span is None or counted.ndim == 1 else -(-batch.inputs.shape[1] // span)
    form = BY_POSITION if span == 1 else BY_GRADIENT

    def squares(batch: Batch, counted: jax.Array, windows: jax.Array) -> dict[str, jax.Array]:
        outputs, pullback = tapped_vjp(traced, form, spans, params, errors, batch.inputs)

        def one_sample(sample: jax.Array) -> dict[str, jax.Array]:
            score = scores(task, batch, outputs, windows, jax.random.fold_in(key, sample))
            s = pullback(jnp.where(counted[..., None], score, 0.0))
            return {path: jnp.square(v).sum(axis=-1).T for path, v in s.items()}

        samples = jax.lax.map(one_sample, jnp.arange(num_samples))
        return {path: v.mean(axis=0) for path, v in samples.items()}

    return in_windows(traced, squares, batch, counted, windows)
