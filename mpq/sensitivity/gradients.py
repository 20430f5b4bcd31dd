"""Gradients of the loss: along errors, window by window, and in whole weights, summed over the data."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.evaluate import Apply, Reference, distributions
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, has_targets, quantization_error
from mpq.sensitivity.by_batch import windows_by_batch
from mpq.sensitivity.errors import Errors, differing_errors
from mpq.sensitivity.taps import BY_GRADIENT, Form, dense, telling_windows, window_slopes
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, WeightSpec


def slopes_of_data(
    form: Form,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    batch_size: int,
    store: Store | None,
    item: str,
) -> tuple[np.ndarray, np.ndarray]:
    """What `form` sums over every window, at the original weights, for all candidates in one pass.

    Args:
      form: `BY_GRADIENT` gives derivatives of the loss of the labels along the errors.
      model: gives the function and the original parameters.
      traced: the model's trace.
      schemes: columns.
      candidates: quantized weights.
      data: windows with labels.
      batch_size: windows per pass.
      store: finished items, one a batch with all its candidates, as in `mpq.sensitivity.by_batch`.
      item: names `form`.

    Returns:
      `bool[weights, schemes]`, the candidates that differ from their weight, and `float64[windows, weights, schemes]`.

    Raises:
      MpqError: a candidate or the model's outputs are not finite.
    """
    shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
    keep, errors = differing_errors(model.params, traced, schemes, candidates)

    def slopes(batch: Batch, counted: jax.Array, numbers: np.ndarray) -> dict[str, jax.Array]:
        del numbers
        return window_slopes(shaped, form, model.task, model.params, errors, batch, counted, None)

    windows = windows_by_batch(
        "sensitivity gradients",
        model,
        traced,
        schemes,
        candidates,
        keep,
        data,
        slopes,
        batch_size=batch_size,
        store=store,
        inputs={"item": item},
    )
    return keep, windows


def divergence_slopes(
    traced: Trace, params: Params, errors: Errors, reference: Reference, keep: np.ndarray
) -> np.ndarray:
    """Derivatives of the divergence from the original model along errors, at any parameters.

    Args:
      traced: the model, traced for the reference's batches: what `telling_windows` gives.
      params: where the derivative is taken.
      errors: directions, from `differing_errors`.
      reference: the original model's outputs.
      keep: `bool[weights, schemes]`, which candidates have a direction.

    Returns:
      `float64[windows, weights, schemes]`, nats; summed over the outputs of a window that count.
    """
    task = reference.model.task
    slopes = lambda batch, p: window_slopes(
        traced, BY_GRADIENT, task, params, errors, batch, task.counted(batch.mask), p
    )
    rows = [dense(jax.device_get(slopes(batch, p)), traced, keep) for batch, p in reference.batches()]
    return np.concatenate(rows)[: len(reference.data.inputs)]


def summed_gradient(
    model: Model, params: Params, weights: Sequence[WeightSpec], data: Dataset, batch_size: int
) -> dict[str, jax.Array]:
    """Gradient of the loss of the labels in the parameters that hold weights, summed over all outputs that count.

    Where the task or the data has no labels, the loss is the divergence from the original model.

    Args:
      model: gives the function, the task and the original.
      params: where the gradient is taken.
      weights: whose parameters.
      data: windows.
      batch_size: windows per pass.

    Returns:
      Parameter -> array of its shape, nats per unit of the parameter.
    """
    names = tuple(dict.fromkeys(spec.param for spec in weights))
    total = {name: jnp.zeros_like(params[name]) for name in names}
    if has_targets(model, data):
        pairs = ((batch, None) for batch in data.batches(batch_size))
    else:
        pairs = Reference(model, data, batch_size).batches()
    for batch, p in pairs:
        total = _add_gradient(model.apply, model.task, total, params, batch, model.task.counted(batch.mask), p)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_gradient(
    apply: Apply, task: Task, total: Params, params: Params, batch: Batch, counted: jax.Array, p: jax.Array | None
) -> dict[str, jax.Array]:
    """`total` plus the gradient of one batch."""

    def loss(chosen: Params) -> jax.Array:
        q = distributions(apply, task, {**params, **chosen}, batch.inputs)
        values = task.loss(q, task.targets(batch.inputs, batch.labels)) if p is None else task.divergence(p, q)
        return jnp.sum(jnp.where(counted, values, 0.0))

    gradient = jax.grad(loss)({name: params[name] for name in total})
    return {name: value + gradient[name] for name, value in total.items()}


def unsigned_products(
    gradient: Params, params: Params, spec: WeightSpec, schemes: Sequence[Scheme], candidates: CandidateSource
) -> np.ndarray:
    """Sum of |gradient * error| over the elements of one weight.

    Args:
      gradient: of the parameters that hold weights.
      params: the original parameters.
      spec: the weight.
      schemes: columns.
      candidates: quantized weights.

    Returns:
      `float64[schemes]`.

    Raises:
      MpqError: a candidate holds NaN or infinity.
    """
    errors = np.asarray(quantization_error(params, spec, schemes, candidates), np.float64)
    return np.abs(errors * np.asarray(spec.to_matrix(gradient[spec.param]), np.float64)).sum(axis=(1, 2, 3))
