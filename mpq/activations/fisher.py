"""Monte Carlo Fisher of activations: the quadratic form of the actual rounding error, from one backward pass a batch.

With x the value, dx = round(x) - x its rounding error at a scheme, and g the pullback to x of random scores at the
outputs, whose second moment is the Fisher matrix there,

    KL(p || p')  ~=  1/2 dx^T F dx,   F = E[g g^T],      s_t = g_t . dx_t   at position t
    loss_increase = 1 / (2 N) * sum over spans ( sum_{t in span} s_t )^2      [nats per output, N outputs that count]

as in `mpq.sensitivity.fisher`, which says what `span` trades and which Fisher this is (Kunstner, Balles and Hennig
2019, arXiv:1905.12558). BRECQ (Li et al. 2021, arXiv:2102.05426) weighs squared errors of outputs by squared gradients
on the same ground; here products are summed before they are squared, so errors of neighbouring features and positions
may cancel. Readers of one value share a tap: their gradients add up before they are squared.

Unlike errors of a weight, which all positions share, dynamic rounding errors of different positions are nearly
independent: little is lost by `span=1`, the default, and whole windows are noisier.

Cost: one forward pass, and for every sample one backward pass, in which every row's value is rounded by every scheme.
Values that are read are kept from the forward pass, as any backward pass does.
Fails on: large errors, where the KL is no longer quadratic (2 bits); outputs that jump, as where a router chooses
another expert, which no gradient sees; and interactions.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.base import make_activation_table, rounded_rows
from mpq.activations.ranges import ActivationRange
from mpq.activations.rows import ActivationSpec, replacing
from mpq.activations.scheme import ActivationScheme, fake_quantize
from mpq.activations.table import ActivationTable
from mpq.files import digest_json
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import check_inputs, measured_on, random_scores
from mpq.sensitivity.by_batch import kept_by_batch
from mpq.sensitivity.taps import in_spans, in_windows, require_finite_windows, telling_windows
from mpq.store import Store
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params

Saved = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ActivationFisher:
    """Monte Carlo Fisher quadratic form of the rounding error.

    Attributes:
      num_samples: draws of the signs of every position; each costs one backward pass.
      span: most positions that are summed before squaring; a window is cut into the fewest spans of equal length. 1:
        independent positions, None: the whole window.
    """

    num_samples: int = 2
    span: int | None = 1

    @property
    def name(self) -> str:
        """`fisher`."""
        return "fisher"

    def __call__(
        self,
        model: Model,
        traced: Trace,
        rows: Sequence[ActivationSpec],
        schemes: Sequence[ActivationScheme],
        data: Dataset,
        *,
        key: jax.Array,
        batch_size: int,
        store: Store | None = None,
        ranges: Mapping[str, ActivationRange] | None = None,
    ) -> ActivationTable:
        """Score every row at every scheme.

        Args:
          model: gives the function and the parameters.
          traced: the model's trace.
          rows: of the table, from this trace.
          schemes: columns of the table.
          data: windows; their labels are not used.
          key: sample m of window w uses only `fold_in(fold_in(key, m), w)`.
          batch_size: windows per pass.
          store: finished items, one a batch with all rows and schemes.
          ranges: of static schemes, by path of the row.

        Raises:
          MpqError: no output counts, a weight is not finite, a scheme does not suit a row, a static range cannot be
            told, or outputs are not finite.
        """
        counts = check_inputs(model, traced.weights, data)
        chosen = rounded_rows(rows, schemes, ranges)
        label = f"{self.name}(num_samples={self.num_samples}, span={self.span})"
        shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
        static = (shaped, tuple(rows), chosen, self.num_samples, self.span, model.task)
        inputs = measured_on(model, traced, data, batch_size) | {"item": f"activation_{label}"}
        inputs |= {"rows": digest_json(rows), "schemes": [*map(str, schemes)], "key": jax.random.key_data(key).tolist()}
        if static_ends := [[one.low, one.high] for row in chosen for one in row if one.low is not None]:
            inputs |= {"limits": static_ends}
        if columns := [one.columns for row in chosen for one in row if one.columns is not None]:
            inputs |= {"columns": columns}

        def halves(batch: Batch, counted: jax.Array, numbers: np.ndarray) -> np.ndarray:
            squares = _squares(*static, model.params, key, batch, counted, numbers)
            return np.stack([squares[row.path] for row in rows], axis=1) / 2

        windows = kept_by_batch(
            f"activations {self.name}", model, data, halves, batch_size=batch_size, store=store, inputs=inputs
        )
        require_finite_windows(windows, np.ones(windows.shape[1:], bool), model, data.source)
        return make_activation_table(label, model, rows, schemes, data, counts, windows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _squares(
    traced: Trace,
    rows: tuple[ActivationSpec, ...],
    chosen: tuple[tuple[RoundedActivation, ...], ...],
    num_samples: int,
    span: int | None,
    task: Task,
    params: Params,
    key: jax.Array,
    batch: Batch,
    counted: jax.Array,
    windows: jax.Array,
) -> dict[str, jax.Array]:
    """For every row `float32[windows, schemes]`: the mean over samples of sum over spans (sum_{t in span} s_t)^2."""
    spans = 1 if span is None or counted.ndim == 1 else -(-batch.inputs.shape[1] // span)

    def squares(batch: Batch, counted: jax.Array, windows: jax.Array) -> dict[str, jax.Array]:
        zeros = {row.path: jnp.zeros((len(chosen[0]), len(windows), spans)) for row in rows}

        def outputs_of(taps: Mapping[str, jax.Array]) -> jax.Array:
            change = lambda row, x: _tap(chosen[row], x, taps[rows[row].path], batch.mask)
            return traced.evaluate(params, batch.inputs, replacing(rows, change)).astype(jnp.float32)

        outputs, pullback = jax.vjp(outputs_of, zeros)

        def one_sample(sample: jax.Array) -> dict[str, jax.Array]:
            score = random_scores(task, outputs, windows, jax.random.fold_in(key, sample))
            (s,) = pullback(jnp.where(counted[..., None], score, 0.0))
            return {path: jnp.square(v).sum(axis=-1).T for path, v in s.items()}

        samples = jax.lax.map(one_sample, jnp.arange(num_samples))
        return {path: v.mean(axis=0) for path, v in samples.items()}

    return in_windows(traced, squares, batch, counted, windows)


def _tap_primal(chosen: tuple[RoundedActivation, ...], x: jax.Array, tap: jax.Array, real: jax.Array) -> jax.Array:
    """`x + sum over schemes of tap * dx`, where only `tap = 0` is ever asked for: `x`.

    Args:
      chosen: the row at every scheme, which give the rounding errors dx.
      x: `[batch, windows * time, width]`.
      tap: `[schemes, windows, spans]`, zeros.
      real: `bool[windows, ...]`.
    """
    del chosen, tap, real
    return x


def _tap_forward(
    chosen: tuple[RoundedActivation, ...], x: jax.Array, tap: jax.Array, real: jax.Array
) -> tuple[jax.Array, Saved]:
    return _tap_primal(chosen, x, tap, real), (x, tap, real)


def _tap_backward(
    chosen: tuple[RoundedActivation, ...], saved: Saved, g: jax.Array
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """The gradient itself, and for the tap `[schemes, windows, spans]`, the sum of g . dx over every span."""
    x, tap, real = saved
    values, gradient = x.astype(jnp.float32), g.astype(jnp.float32)
    products = []
    for one in chosen:
        options: dict[str, Any] = {"heads": one.spec.heads, "real": real, **one.fixed}
        error = fake_quantize(values, one.scheme.kind, one.scheme.top, **options) - values
        products.append((gradient * error).sum(axis=(0, 2)))
    s = in_spans(jnp.stack(products)[..., None], tap).sum(axis=(-2, -1))
    return g, s, np.zeros(real.shape, jax.dtypes.float0)


_tap = jax.custom_vjp(_tap_primal, nondiff_argnums=(0,))
_tap.defvjp(_tap_forward, _tap_backward)
