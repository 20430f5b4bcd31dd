"""Top eigenvalue of the Hessian: HAWQ (Dong et al. 2019, arXiv:1905.03696).

    loss_increase = 1/2 lambda_l ||delta_l||^2     [nats per output]

with lambda_l the largest eigenvalue of H_l = d^2 L / dw_l^2 and L the mean loss, as in `hessian`. It is what the error
would cost if it lay along the eigenvector, an upper bound of the `hessian` form. lambda_l comes from power iteration
v <- H_l v / ||H_l v|| from random signs. The iteration finds the eigenvalue of largest *size*, and Hessians of networks
have negative ones; so as many steps follow on H_l + ||H_l v|| I, from where the first ones stopped: the shift makes the
negative end of the spectrum its small end.
Blocks are iterated one by one: with all at once the cross terms H_lj v_j would stay, since an iterate has no mean zero.

lambda_l is the Rayleigh quotient of the last v, and its standard error over documents is that of the quotient with v
held fixed; it says nothing about the steps that are missing. The quotient never lies above the true eigenvalue by more
than rounding, and approaches it by the factor ((lambda_2 + r) / (lambda_1 + r))^2 a step, r the shift.

Cost: 2 `num_iterations` Hessian-vector products of all weights (about two gradients and a forward pass) over all data
for every weight, and all data on the device; schemes cost nothing. The dearest of all metrics, for the sake of
comparison.
Fails on: errors that do not lie along the eigenvector, which is all of them: rounding errors are spread over all
directions, so the result is too large: 4 to 40 times in the tests' model, of 16 to 28 elements a weight.

Differences from the paper: it ranks blocks by lambda_l / n_l (n_l elements), and picks bits from the ranking by hand;
lambda_l ||delta_l||^2 only orders its fine-tuning. Here that product, with the 1/2 of Taylor's formula, is the result.
The shift is added; the number of steps is given instead of a tolerance, so that the batch size changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.curvature import hvp, rademacher_like
from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import require_finite, require_labels
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    check_inputs,
    half_mean_square,
    make_table,
    measured_on,
    output_losses,
)
from mpq.sensitivity.hessian_form import rows_along
from mpq.store import kept
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class TopEigenvalue:
    """HAWQ's largest Hessian eigenvalue.

    Attributes:
      num_iterations: power iterations without the shift, and as many with it.
    """

    num_iterations: int = 16

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`top_eigenvalue`."""
        return "top_eigenvalue"

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
          traced: gives the weights.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows, with their real labels where the task has any.
          key: of the first vectors; that of a weight depends on its own path alone.
          batch_size: windows per pass.
          store: finished weights.

        Raises:
          MpqError: no output counts, a label is no class of the model, or a weight, a candidate or a product is not
            finite.
        """
        counts = check_inputs(model, traced.weights, data)
        require_labels(model, model.params, data)
        quotients = np.zeros((len(data.inputs), len(traced.weights)))
        stacked: Batch = jax.tree.map(lambda *parts: np.stack(parts), *data.batches(batch_size))
        label = f"{self.name}(num_iterations={self.num_iterations})"
        on, seed = measured_on(model, traced, data, batch_size), jax.random.key_data(key).tolist()

        paths = [spec.path for spec in traced.weights]  # one function multiplies by all blocks: they decide last bits

        def make(spec: WeightSpec) -> list[float]:
            direction = self._top_eigenvector(model, traced.weights, spec, stacked, key)
            return rows_along(model, data, batch_size, direction)[: len(data.inputs)].tolist()

        for row, spec in enumerate(track(traced.weights, "sensitivity top_eigenvalue", len(traced.weights))):
            one = functools.partial(make, spec)
            quotients[:, row] = kept(store, one, item=label, **on, key=seed, weight=spec.path, among=paths)
        require_finite(quotients, model.params, f"{data.source}, in a Hessian-vector product")
        eigenvalue, error = mean_over_documents(sums_over_documents(quotients, data.document), counts)
        half = np.array(
            [half_mean_square(model.params, spec, schemes, candidates) * spec.size for spec in traced.weights]
        )
        stderr = np.where(half == 0, 0.0, error[:, None] * half)  # an exact candidate costs nothing: that is certain
        loss = eigenvalue[:, None] * half
        return make_table(label, model, traced.weights, schemes, candidates, data, loss, stderr)

    def _top_eigenvector(
        self, model: Model, specs: tuple[WeightSpec, ...], spec: WeightSpec, batches: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """A direction of length 1 that moves `spec` alone, in the structure of the parameters."""
        weights = {other.path: other.to_matrix(model.params[other.param]) for other in specs}
        counted = np.stack([model.task.counted(mask) for mask in batches.mask])
        block = {path: jnp.float32(path == spec.path) for path in weights}
        start = rademacher_like(key, weights)
        iterate = functools.partial(_iterate, model.apply, model.task, specs)
        v = iterate(model.params, weights, batches, counted, block, start, self.num_iterations)
        zeros = {path: jnp.zeros_like(param) for path, param in model.params.items()}
        return spec.write(zeros, v[spec.path])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _iterate(
    apply: Callable[[Params, jax.Array], jax.Array],
    task: Task,
    specs: tuple[WeightSpec, ...],
    params: Params,
    weights: Params,
    batches: Batch,
    counted: jax.Array,
    block: Mapping[str, jax.Array],
    start: Params,
    num_iterations: jax.Array,
) -> dict[str, jax.Array]:
    """Power iteration on the block of the Hessian that `block` is 1 on, 0 elsewhere; the data are stacked batches.

    The block is an argument, so that one compiled function serves all weights: it pays for products of all of them.
    """

    def loss(weights: Params, batch_counted: tuple[Batch, jax.Array]) -> jax.Array:
        batch, counted = batch_counted
        changed = functools.reduce(lambda p, spec: spec.write(p, weights[spec.path]), specs, dict(params))
        return jnp.sum(jnp.where(counted, output_losses(apply, task, changed, batch), 0.0))

    def product(v: Params) -> dict[str, jax.Array]:
        add = lambda total, part: (jax.tree.map(jnp.add, total, hvp(loss, weights, part, v)), None)
        total = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), (batches, counted))[0]
        return _scaled(total, block)

    def step(i: jax.Array, state: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        v, shift = state
        hv = product(v)
        shifted = i >= num_iterations
        moved = jax.tree.map(lambda a, b: a + jnp.where(shifted, shift, 0.0) * b, hv, v)
        return _unit(moved), jnp.where(shifted, shift, _norm(hv))

    return jax.lax.fori_loop(0, 2 * num_iterations, step, (_unit(_scaled(start, block)), jnp.float32(0)))[0]


def _scaled(tree: Params, factors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: leaf * factors[path] for path, leaf in tree.items()}


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in tree.values()))


def _unit(tree: Params) -> dict[str, jax.Array]:
    """Of length 1; what is zero stays zero, as where the loss does not depend on the weight."""
    norm = _norm(tree)
    return {path: leaf / jnp.where(norm > 0, norm, 1.0) for path, leaf in tree.items()}
