"""How much the end loss depends on each position of a weight's output: what makes a gram aware of it.

A change dy_t of a weight's output at position t costs 1/2 sum_t dy_t^T G_t dy_t nats to second order, G_t the Fisher
matrix there. Rounding by a layer's squared error takes the same G_t for all positions. Here it is g_t I, with

    g_t = (mean over output features of E[e_t^2])^exponent

where e pulls the outputs' scores (`mpq.sensitivity.fisher`) back to the weight's output: so the gram that rounding
goes by is E[g_t x_t x_t^T], weighted by how much each token matters to the loss (GuidedQuant, Kim et al. 2025,
arXiv:2505.07004, eq. 7; YAQA, Tseng et al. 2025, arXiv:2505.22988, has a full matrix on the output side). Trained
models have few positions that matter far more than all others, so that the form itself, `exponent` 1, rests on few of
the tokens that calibration saw; `exponent` 0 is the plain gram, and the root between them keeps more of both.

Cost: `num_samples` backward passes over the calibration set and one forward pass; a gram for every weight, where
weights that read one value share one otherwise.
Fails on: too little data, where what matters most is a handful of tokens; a model that cannot be differentiated.

Differences from the papers: the Fisher matrix of the model's own distribution, by random signs, for the gradient of
the data's labels; all output features of a weight share a gram.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import Read, Weighting, reads
from mpq.finite import all_finite
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import random_scores
from mpq.tasks import Task
from mpq.trace import Default, Site, Trace
from mpq.types import MpqError, Params


@dataclasses.dataclass(frozen=True)
class Guide:
    """Weights of positions by the end loss.

    Attributes:
      exponent: of the mean square, at least 0.
      num_samples: draws of the signs of every output; each costs a backward pass.
      seed: of the signs.
    """

    exponent: float = 0.5
    num_samples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.exponent < float("inf") or self.num_samples < 1:
            raise MpqError(
                f"exponent {self.exponent} and num_samples {self.num_samples} of a guide must be at least 0 and 1, "
                "such as 0.5 and 4"
            )

    def __call__(self, model: Model, traced: Trace, data: Dataset, batch_size: int) -> Iterator[Weighting]:
        """The weights of one batch after another, for `mpq.calibrate.calibrate` and `Propagation`.

        Args:
          model: gives the task and the parameters.
          traced: the model, traced for any batch size.
          data: the calibration set; labels are not used.
          batch_size: windows a pass. It changes the result by rounding alone: signs go by window.

        Yields:
          For each batch, what a weight reads -> `float32[batch of the weight, tokens]`, at least 0.

        Raises:
          MpqError: a gradient is not finite (its weight is named).
        """
        traced = traced.on((batch_size, *data.inputs.shape[1:]))
        key, first = jax.random.key(self.seed), 0
        for batch in data.batches(batch_size):
            windows, counted = jnp.arange(first, first + batch_size), model.task.counted(np.asarray(batch.mask))
            found = _mean_squares(
                traced, model.task, self.num_samples, model.params, batch.inputs, jnp.asarray(counted), windows, key
            )
            for (path, _), squares in found.items():
                if not all_finite(squares):
                    raise MpqError(
                        f"the gradient in the output of weight {path} is not finite on windows {first} to "
                        f"{first + batch_size - 1} of {data.source}: check the model on these inputs"
                    )
            yield {read: squares**self.exponent for read, squares in found.items()}
            first += batch_size

    def kept(self, model: Model, traced: Trace, data: Dataset, batch_size: int) -> list[Weighting]:
        """The same of all batches at once, for whoever wants them more than once. Shows progress."""
        batches = self(model, traced, data, batch_size)
        return list(track(batches, "weigh tokens", -(-len(data.inputs) // batch_size)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mean_squares(
    traced: Trace,
    task: Task,
    num_samples: int,
    params: Params,
    inputs: jax.Array,
    counted: jax.Array,
    windows: jax.Array,
    key: jax.Array,
) -> dict[Read, jax.Array]:
    """Mean over samples and output features of the squared gradient in the output, `[batch of the weight, tokens]`."""
    first = reads(traced)
    taps = {read: jnp.zeros((site.spec.batch, _tokens(site))) for read, site in first.items()}

    def outputs_of(taps: Mapping[Read, jax.Array]) -> jax.Array:
        def tapped(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
            read = site.spec.path, site.use.input
            return _tap(site, default(x, w), taps[read]) if read in taps else default(x, w)

        return traced.evaluate(params, inputs, replace=tapped).astype(jnp.float32)

    outputs, pullback = jax.vjp(outputs_of, taps)

    def one_sample(sample: jax.Array) -> dict[Read, jax.Array]:
        scores = random_scores(task, outputs, windows, jax.random.fold_in(key, sample))
        return pullback(jnp.where(counted[..., None], scores, 0.0))[0]

    samples = jax.lax.map(one_sample, jnp.arange(num_samples))
    return {read: squares.mean(axis=0) for read, squares in samples.items()}


def _tokens(site: Site) -> int:
    """Rows of the output's matrix for each entry of the weight's batch."""
    return int(np.prod(site.token_shape))


def _tap_primal(site: Site, y: jax.Array, tap: jax.Array) -> jax.Array:
    """`y`; the derivative in the tap is by definition the mean square of that in `y`."""
    del site, tap
    return y


def _tap_forward(site: Site, y: jax.Array, tap: jax.Array) -> tuple[jax.Array, tuple[()]]:
    return _tap_primal(site, y, tap), ()


def _tap_backward(site: Site, saved: tuple[()], e: jax.Array) -> tuple[jax.Array, jax.Array]:
    del saved
    return e, jnp.square(site.outputs_matrix(e).astype(jnp.float32)).mean(axis=-1)


_tap = jax.custom_vjp(_tap_primal, nondiff_argnums=(0,))
_tap.defvjp(_tap_forward, _tap_backward)
