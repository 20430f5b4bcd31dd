"""Relative error of the output, exllamav2's measure of a quantized layer (github.com/turboderp-org/exllamav2).

    rfn[l, s]  =  mean over windows of ||X delta_ls||_F / ||X w_l||_F,    c[l, s]  =  rfn[l, s]^2

in nats by one measured plan (`mpq.sensitivity.anchor`). X are the inputs of the weight in a window of the unquantized
model, positions that count, all uses; of a lookup the output is the rows looked up. exllamav2's optimizer minimizes the
sum of rfn^p over layers, and tries p from 1.5 to 3.5 for the smallest maximum; here p is 2, with which the score grows
with the error as a loss near its minimum does.

Cost: one forward pass, on every scheme a product of input and error, and two forward passes for the unit.
Fails on: outputs that matter unequally. Relative errors of a weight that adds little to the residual stream and of one
that carries it count alike; nothing says which outputs the loss sees.

Differences from exllamav2: the output of each weight by itself instead of that of its attention or MLP block with the
residual stream in it, which tracing does not know of, so that small blocks are not forgiven; embeddings and the head,
which it leaves out, are scored; rounding is by the given quantizer.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import counted_rows
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import CandidateSource, Coupling, Store, candidates_digest, check_inputs, measured_on
from mpq.sensitivity.errors import Errors, differing_errors
from mpq.sensitivity.taps import dense, in_windows, require_finite_windows, telling_windows
from mpq.store import kept
from mpq.trace import Site, Trace
from mpq.types import Params, Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class ExLlamaV2:
    """Squared relative error of the weight's output. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`exllamav2`."""
        return "exllamav2"

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
        """Score every weight at every scheme.

        Args:
          model: gives the function and the original parameters.
          traced: the model's trace.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows that give the inputs, and that the one plan is measured on.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, the scores and the measurement.

        Raises:
          MpqError: no output counts, a weight, a candidate or the outputs of a weight are not finite, or the measured
            plan's outputs are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        on = measured_on(model, traced, data, batch_size)
        among = candidates_digest(traced.weights, schemes, candidates)
        make = lambda: _scores(model, traced, schemes, candidates, data, batch_size).tolist()
        scores = np.array(kept(store, make, item=self.name, **on, candidates=among), np.float64)
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


def _scores(
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    batch_size: int,
) -> np.ndarray:
    """`float64[weights, schemes]`: the square of the mean relative error over windows that hold a position."""
    shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
    keep, errors = differing_errors(model.params, traced, schemes, candidates)
    if not errors:
        return np.zeros(keep.shape)
    batches = track(data.batches(batch_size), "sensitivity exllamav2", -(-len(data.inputs) // batch_size))
    rows = [
        dense(jax.device_get(_relative_errors(shaped, model.params, errors, b.inputs, b.mask)), traced, keep)
        for b in batches
    ]
    windows = np.concatenate(rows)[: len(data.inputs)][data.mask.reshape(len(data.mask), -1).any(axis=1)]
    require_finite_windows(windows, keep, model, data.source)
    return np.square(windows.mean(axis=0))


@functools.partial(jax.jit, static_argnums=0)
def _relative_errors(
    traced: Trace, params: Params, errors: Errors, inputs: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Path -> `float32[windows, schemes]`; 0 for a window without output."""
    specs = {site.spec.path: site.spec for site in traced.sites if site.spec.path in errors}
    # the weight itself in front of its errors: both have their outputs' squares summed
    matrices = {
        path: jnp.concatenate([spec.to_matrix(params[spec.param])[None], errors[path].matrices()])
        for path, spec in specs.items()
    }

    def relative(inputs: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        def update(site: Site, x: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
            path = site.spec.path
            return sums | {path: sums[path] + _squares(site, x, matrices[path], mask)} if path in sums else sums

        zeros = {path: jnp.zeros((len(m), len(inputs))) for path, m in matrices.items()}
        _, sums = traced.accumulate(params, inputs, zeros, update)
        return {path: jnp.sqrt(jnp.where(s[0] > 0, s[1:] / s[0], 0.0)).T for path, s in sums.items()}

    return in_windows(traced, relative, inputs, mask)


def _squares(site: Site, x: jax.Array, matrices: jax.Array, mask: jax.Array) -> jax.Array:
    """`float32[matrices, windows]`: squared norm of each window's output; one by one, since outputs are large."""
    counted = counted_rows(site, mask)[:, None]
    if site.use.kind == "embedding":
        output = lambda matrix: jnp.take(matrix[0].T, x.reshape(-1), axis=0)[None]
    else:
        rows = site.inputs_matrix(x).astype(matrices.dtype)
        output = lambda matrix: rows @ matrix
    squares = lambda matrix: jnp.sum(jnp.square(jnp.where(counted, output(matrix), 0.0)), axis=(0, 2))
    return jax.lax.map(squares, matrices).reshape(len(matrices), len(mask), -1).sum(axis=2)
