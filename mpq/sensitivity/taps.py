"""Derivatives of the loss along quantization errors, window by window, from one backward pass for all candidates.

With x at a weight's input and e = d(loss)/dy at its output, the derivative of the loss along an error delta of the
weight is a sum over positions,

    s_t = x_t^T delta e_t,        d loss(w + c delta) / dc  at c = 0   =   sum_t s_t

and the sum can stop at windows or at spans of them. `taps[path][scheme, window, span]` scales an error x @ delta that
is added to the weight's output, and the derivative in the tap at zero is the sum of s over the span. Uses of a weight
share the tap, so that they add up. A `Form` says how x, delta and e are contracted, or what is made of them instead.

What a window did is known where an operation's rows are those of single windows. A read that all windows of a batch
share, as the lookup of learned positions, would give one gradient for all of them: a model with one is evaluated window
by window.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.evaluate import require_finite
from mpq.inputs import Batch
from mpq.models.model import Model
from mpq.sensitivity.errors import Errors, WeightErrors, looked_up
from mpq.tasks import Task
from mpq.trace import Site, Trace
from mpq.types import Params

Contraction = Callable[[jax.Array, WeightErrors, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is summed over the positions of a span. Static: compiled functions take it as it is.

    Attributes:
      of_matmul: `(x[batch, windows, spans, time, k], errors of [batch, k, n], e[batch, windows, spans, time, n]) ->
        [schemes, windows, spans]`.
      of_lookup: the same of an embedding, `(indices[windows, spans, time], errors of [1, k, vocabulary],
        e[windows, spans, time, k])`.
    """

    of_matmul: Contraction
    of_lookup: Contraction


def telling_windows(traced: Trace) -> Trace:
    """`traced`, or the trace of a single window where windows share a read, so that none is told from the others.

    A read is shared if it has as many rows for one window as for the batch.
    """
    whole = dataclasses.replace(traced, weights=tuple(dict.fromkeys(site.spec for site in traced.sites)))
    one = whole.on((1, *traced.inputs.shape[1:]))
    rows = lambda trace: [math.prod(site.token_shape) for site in trace.sites]
    if all(a != b for a, b in zip(rows(traced), rows(one), strict=True)):
        return traced
    of_one = {spec.path: spec for spec in one.weights}
    return dataclasses.replace(one, weights=tuple(of_one[spec.path] for spec in traced.weights))


def in_windows(traced: Trace, function: Callable[..., dict[str, jax.Array]], *rows: Any) -> dict[str, jax.Array]:
    """`function(*rows)`: at once, or window by window where `traced` takes one at a time. Call it where JAX traces.

    Args:
      traced: what `function` evaluates.
      function: rows to path -> `[windows, ...]`.
      *rows: pytrees of arrays whose first axis is windows.
    """
    if traced.inputs.shape[0] == len(jax.tree.leaves(rows)[0]):
        return function(*rows)
    singles = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], rows)
    return {path: value[:, 0] for path, value in jax.lax.map(lambda row: function(*row), singles).items()}


def tapped_vjp(
    traced: Trace, form: Form, spans: int, params: Params, errors: Errors, inputs: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], dict[str, jax.Array]]]:
    """The model's outputs, and what a gradient in them makes of the errors. Call it where JAX traces.

    Args:
      traced: the model, traced for these inputs.
      form: what is summed.
      spans: parts of a window.
      params: where the derivative is taken.
      errors: directions.
      inputs: one batch.

    Returns:
      `(outputs, pullback)`: float32, and gradient in the outputs -> path -> `float32[schemes, windows, spans]`.
    """
    taps = {path: jnp.zeros((len(error), inputs.shape[0], spans)) for path, error in errors.items()}

    def outputs_of(taps: Mapping[str, jax.Array]) -> jax.Array:
        def tapped(site: Site, x: jax.Array, w: jax.Array, default: Callable[..., jax.Array]) -> jax.Array:
            path = site.spec.path
            y = default(x, w)
            return _tap(site, form, y, x, errors[path], taps[path]) if path in taps else y

        return traced.evaluate(params, inputs, replace=tapped).astype(jnp.float32)

    outputs, pullback = jax.vjp(outputs_of, taps)
    return outputs, lambda gradient: pullback(gradient)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def window_slopes(
    traced: Trace,
    form: Form,
    task: Task,
    params: Params,
    errors: Errors,
    batch: Batch,
    counted: jax.Array,
    p: jax.Array | None,
) -> dict[str, jax.Array]:
    """Derivatives of the loss of every window along every error; with another form, what that form sums.

    Args:
      traced: the model, traced for these inputs: what `telling_windows` gives.
      form: what is summed.
      task: what the outputs mean.
      params: where the derivative is taken.
      errors: directions.
      batch: inputs with their labels.
      counted: `bool[batch, ...]`, `Task.counted`.
      p: distributions that the loss is the divergence from; None: the loss is that of the labels.

    Returns:
      Path -> `float32[windows, schemes]`, nats.
    """

    def slopes(batch: Batch, counted: jax.Array, p: jax.Array | None) -> dict[str, jax.Array]:
        outputs, pullback = tapped_vjp(traced, form, 1, params, errors, batch.inputs)

        def loss(outputs: jax.Array) -> jax.Array:
            q = task.distribution(outputs)
            values = task.loss(q, task.targets(batch.inputs, batch.labels)) if p is None else task.divergence(p, q)
            return jnp.sum(jnp.where(counted, values, 0.0))

        return {path: s[..., 0].T for path, s in pullback(jax.grad(loss)(outputs)).items()}

    return in_windows(traced, slopes, batch, counted, p)


def dense(sums: Mapping[str, np.ndarray], traced: Trace, keep: np.ndarray) -> np.ndarray:
    """`float64[windows, weights, schemes, ...]` of one `[windows, schemes that differ, ...]` a weight; 0 elsewhere."""
    windows, _, *rest = next(iter(sums.values())).shape
    dense = np.zeros((windows, *keep.shape, *rest))
    for row, spec in enumerate(traced.weights):
        if spec.path in sums:
            dense[:, row, keep[row]] = sums[spec.path]
    return dense


def require_finite_windows(values: np.ndarray, keep: np.ndarray, model: Model, source: str) -> None:
    """Tell a model that fails from a candidate that does.

    Args:
      values: `float64[windows, weights, schemes, ...]`.
      keep: `bool[weights, schemes]`, the candidates that differ from their weight.
      model: whose outputs they came from.
      source: of the data, for the message.

    Raises:
      MpqError: in a window every candidate fails: it is the model.
    """
    if keep.any() and not np.isfinite(values[:, keep]).any(axis=1).all():
        require_finite(values, model.params, source)


def _tap_primal(site: Site, form: Form, y: jax.Array, x: jax.Array, errors: WeightErrors, tap: jax.Array) -> jax.Array:
    """`y + sum over schemes of tap * (x @ delta)`, where only `tap = 0` is ever asked for: `y`.

    Written by hand because reverse mode would compute and keep `x @ delta` of every scheme in the forward pass.
    """
    del site, form, x, errors, tap
    return y


def _tap_forward(
    site: Site, form: Form, y: jax.Array, x: jax.Array, errors: WeightErrors, tap: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, WeightErrors, jax.Array]]:
    return _tap_primal(site, form, y, x, errors, tap), (x, errors, tap)


def _tap_backward(
    site: Site, form: Form, saved: tuple[jax.Array, WeightErrors, jax.Array], e: jax.Array
) -> tuple[jax.Array, None, None, jax.Array]:
    x, errors, tap = saved
    out = in_spans(site.outputs_matrix(e).astype(np.float32), tap)
    if site.use.kind == "embedding":
        s = form.of_lookup(in_spans(x.reshape(1, -1, 1), tap)[0, ..., 0], errors, out[0])
    else:
        s = form.of_matmul(in_spans(site.inputs_matrix(x).astype(np.float32), tap), errors, out)
    return e, None, None, s


_tap = jax.custom_vjp(_tap_primal, nondiff_argnums=(0, 1))
_tap.defvjp(_tap_forward, _tap_backward)


def _of_lookup(indices: jax.Array, errors: WeightErrors, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]`: of an embedding, the error of the row looked up times e, summed over a span.

    Args:
      indices: `int[windows, spans, time]`.
      errors: of `[1, k, vocabulary]`.
      out: e, `[windows, spans, time, k]`.
    """
    return jnp.sum(looked_up(errors, indices) * out, axis=(-2, -1))


def _of_positions(x: jax.Array, errors: WeightErrors, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]` by way of x @ delta: for spans of one, which are smaller than their gradients."""
    outputs = jnp.einsum("bwptk,sbkn->sbwptn", x, errors.matrices())
    return jnp.einsum("sbwptn,bwptn->swp", outputs, out)


def _of_gradients(x: jax.Array, errors: WeightErrors, out: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]` by way of the gradient x^T e of every span: one matmul serves all schemes.

    Window by window: the gradients of a window's spans take `spans * batch * k * n` values, whatever the batch size.
    Of a large weight some columns at a time are worked out, so that neither those nor the errors are held at once.
    """
    n, width = out.shape[-1], errors.columns_at_once(out.shape[2])
    if width == n:
        return _of_columns(x, errors.matrices(), out)

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        first = jnp.minimum(start, n - width)
        select = lambda a: jax.lax.dynamic_slice_in_dim(a, first, width, axis=-1)
        new = jnp.where(first + jnp.arange(width) >= start, select(out), 0.0)  # the last part overlaps the one before
        return total + _of_columns(x, errors.matrices(select), new), None

    zeros = jnp.zeros((len(errors), *out.shape[1:3]))
    return jax.lax.scan(add, zeros, jnp.arange(0, n, width))[0]


def _of_columns(x: jax.Array, error: jax.Array, out: jax.Array) -> jax.Array:
    flat = error.reshape(len(error), -1).T

    def one_window(xe: tuple[jax.Array, jax.Array]) -> jax.Array:
        gradient = jnp.einsum("bptk,bptn->pbkn", *xe)
        return gradient.reshape(len(gradient), -1) @ flat

    s = jax.lax.map(one_window, (x.swapaxes(0, 1), out.swapaxes(0, 1)))
    return s.transpose(2, 0, 1)


def in_spans(matrix: jax.Array, tap: jax.Array) -> jax.Array:
    """`[batch, windows * time, columns]` to `[batch, windows, spans, time, columns]`, filled up with zeros."""
    num_windows, spans = tap.shape[1:]
    windows = matrix.reshape(len(matrix), num_windows, -1, matrix.shape[-1])
    time = windows.shape[2]
    length = -(-time // spans)
    padded = jnp.pad(windows, [(0, 0), (0, 0), (0, spans * length - time), (0, 0)])
    return padded.reshape(len(matrix), num_windows, spans, length, -1)


BY_GRADIENT = Form(_of_gradients, _of_lookup)
"""s by way of the gradient of every span."""

BY_POSITION = Form(_of_positions, _of_lookup)
"""s by way of x @ delta at every position."""
