"""Interactions: what the errors of two weights cost together beyond what each costs alone, to second order.

With a_i = J delta_i the derivative of the model's outputs along the error of candidate i = (weight, scheme), and F the
Fisher matrix of the outputs that count, the second-order loss of a plan that takes the candidates i in P is

    loss(P) = sum_{i, j in P} K_ij,      K_ij = 1/(2N) a_i^T F a_j      [nats per output, N outputs that count]

whose diagonal is the table of `gauss_newton`. A table alone leaves out the rest: what CLADO (Deng et al. 2023,
arXiv:2307.05657) measures pair by pair at a cost quadratic in the candidates, and IMPQ (arXiv:2509.15455) estimates
from plans. Here K is a Gram of vectors, and those are sketched. With F_t = S_t S_t^T for every output t
(`Task.fisher_root`) and signs r_t, drawn `num_probes` times for every window w,

    s_iwm = sum_{t in w} (S_t r_tm)^T a_it         E[s_iwm s_jwm] = sum_{t in w} a_it^T F_t a_jt   exactly,

so that 1/(2 N M) sum_wm s_iwm s_jwm is unbiased (signs as a projection: Achlioptas 2003, J. Comput. Syst. Sci. 66(4);
Woodruff 2014, arXiv:1411.4357). Its relative standard error for the loss of one fixed plan is at most sqrt(2 / (W M))
for W windows of equal weight, however many weights there are.

Only correlations are taken from the sketch. They are shrunk towards zero by the intensity that minimises the expected
squared error over all pairs of different weights (for correlations Schaefer and Strimmer 2005, Stat. Appl.
Genet. Mol. Biol. 4(1):32, target D, after Ledoit and Wolf 2003),

    lambda = sum_{i<j} Var(r_ij) / sum_{i<j} r_ij^2,    in [0, 1]

with the variance over documents, which sees the data's noise and the sketch's. The scale is that of a table:

    K_ij = sqrt(t_i t_j) (1 - lambda) r_ij,     K_ii = t_i

`gauss_newton`'s gives the second-order term with its exact diagonal, `kl`'s keeps what was measured of large errors.
Both are positive semi-definite, as r is a Gram of unit vectors.

Cost: one forward pass and `num_probes` backward passes, whatever the number of candidates; for each candidate one
multiply-add an element and probe. Memory: `num_probes` numbers for every candidate and window. The correlations take
`8 (L S)^2` bytes, and of every document once more.
Fails on: terms beyond the second order, which at 2 bits are as large as these; few documents, where lambda is noisy;
functions that JAX cannot differentiate in reverse mode.

Differences from the papers: the pairs are never evaluated one by one; Var(r_ij) is that of a ratio, by the delta method
(r_ij moves with the norms too), for documents of unequal length.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, check_inputs, random_scores, require_finite_entries
from mpq.sensitivity.by_batch import windows_by_batch
from mpq.sensitivity.errors import Errors, differing_errors
from mpq.sensitivity.taps import BY_GRADIENT, in_windows, tapped_vjp, telling_windows
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True, eq=False)
class InteractionTable:
    """Sketches of what every candidate does to the outputs: their products are the interactions.

    Attributes:
      weights, schemes: as in a `SensitivityTable`.
      sketch: `float64[L, S, P]`, `sketch[i] . sketch[j]` estimates K_ij in nats per output; 0 where the candidate is
        the weight itself.
      shrinkage: lambda, what correlations are shortened by, 0 to 1.
      quantizer: name of the rounding algorithm.
      model_digest, data_digest: what it was made from.
    """

    weights: tuple[WeightSpec, ...]
    schemes: tuple[Scheme, ...]
    sketch: np.ndarray
    shrinkage: float
    quantizer: str
    model_digest: str
    data_digest: str

    def correlation(self) -> np.ndarray:
        """`float64[L, S, L, S]`, shrunk, 1 on the diagonal: also between the schemes of one weight."""
        unit = _unit(self.sketch).reshape(-1, self.sketch.shape[-1])
        shrunk = (1 - self.shrinkage) * (unit @ unit.T)
        np.fill_diagonal(shrunk, 1.0)
        return shrunk.reshape(self.sketch.shape[:2] * 2)

    def matrix(self, table: SensitivityTable) -> np.ndarray:
        """K at the scale of `table`: `float64[L, S, L, S]` nats per output, its diagonal that of the table.

        Args:
          table: of the same weights, schemes and rounding. An entry that is not positive has no interactions.

        Raises:
          MpqError: a table of other candidates.
        """
        self._check(table)
        scale = np.sqrt(np.maximum(table.loss_increase, 0.0))
        matrix = self.correlation() * np.multiply.outer(scale, scale)
        size = table.loss_increase.size
        np.fill_diagonal(matrix.reshape(size, size), table.loss_increase)
        return matrix

    def predict(self, table: SensitivityTable, choice: Mapping[str, Scheme]) -> float:
        """Loss of a plan with the interactions of its weights, nats per output, at the scale of `table`.

        Linear in the number of weights: no matrix is formed.

        Args:
          table: see `matrix`.
          choice: path -> scheme, for every weight.

        Raises:
          MpqError: a table of other candidates, or a plan that lacks a weight or takes another scheme.
        """
        self._check(table)
        columns = [self._column(spec, choice) for spec in self.weights]
        rows = np.arange(len(columns))
        alone = table.loss_increase[rows, columns]
        moves = _unit(self.sketch[rows, columns]) * np.sqrt(np.maximum(alone, 0.0))[:, None]
        pairs = np.square(moves.sum(axis=0)).sum() - np.square(moves).sum()
        return float(alone.sum() + (1 - self.shrinkage) * pairs)

    def _column(self, spec: WeightSpec, choice: Mapping[str, Scheme]) -> int:
        scheme = choice.get(spec.path)
        if scheme not in self.schemes:
            raise MpqError(
                f"the plan gives {spec.path} {scheme}, which is none of {', '.join(map(str, self.schemes))}: give "
                "every weight one of them"
            )
        return self.schemes.index(scheme)

    def _check(self, table: SensitivityTable) -> None:
        ours = (self.weights, self.schemes, self.quantizer, self.model_digest)
        if ours != (table.weights, table.schemes, table.quantizer, table.model_digest):
            raise MpqError(
                f"the table of {table.metric} has other weights, schemes, rounding or model than the interactions: "
                "compute both from the same candidates"
            )


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Computes the sketches.

    Attributes:
      num_probes: numbers for every candidate and window; each costs one backward pass.
    """

    num_probes: int = 16

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
    ) -> InteractionTable:
        """Sketch every weight at every scheme.

        Args:
          model: gives the function and the original parameters.
          traced: the model's trace.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows of two documents or more; their labels are not used.
          key: probe m of window w uses only `fold_in(fold_in(key, m), w)`: neither the batch size nor more probes or
            windows change what is drawn.
          batch_size: windows per pass.
          store: finished items, one a batch.

        Raises:
          MpqError: outputs of fewer than two documents count, or a weight, a candidate or the model's outputs are not
            finite.
        """
        counts = check_inputs(model, traced.weights, data)
        if np.count_nonzero(counts) < 2:
            raise MpqError(
                f"{data.source} has one document with outputs that count: the shrinkage of interactions is estimated "
                "from the differences between documents, so give two or more"
            )
        shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
        keep, errors = differing_errors(model.params, traced, schemes, candidates)
        windows = windows_by_batch(
            "interactions",
            model,
            traced,
            schemes,
            candidates,
            keep,
            data,
            functools.partial(_sketches, shaped, self.num_probes, model.task, model.params, errors, key),
            batch_size=batch_size,
            store=store,
            inputs={"item": f"interactions({self.num_probes})", "key": jax.random.key_data(key).tolist()},
            shape=(self.num_probes,),
        )
        sketch = windows / np.sqrt(2 * self.num_probes * counts.sum())
        require_finite_entries(np.square(sketch).sum(axis=(0, 3)), traced.weights, schemes)
        return InteractionTable(
            weights=tuple(traced.weights),
            schemes=tuple(schemes),
            sketch=np.moveaxis(sketch, 0, 2).reshape(*sketch.shape[1:3], -1),
            shrinkage=shrinkage(sketch, data.document, int(np.count_nonzero(counts))),
            quantizer=candidates.quantizer.name,
            model_digest=model.digest,
            data_digest=data.digest,
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sketches(
    traced: Trace,
    num_probes: int,
    task: Task,
    params: Mapping[str, jax.Array],
    errors: Errors,
    key: jax.Array,
    batch: Batch,
    counted: jax.Array,
    windows: jax.Array,
) -> dict[str, jax.Array]:
    """For every weight `float32[windows, schemes, probes]`."""

    def sketches(batch: Batch, counted: jax.Array, windows: jax.Array) -> dict[str, jax.Array]:
        outputs, pullback = tapped_vjp(traced, BY_GRADIENT, 1, params, errors, batch.inputs)

        def one_probe(probe: jax.Array) -> dict[str, jax.Array]:
            scores = random_scores(task, outputs, windows, jax.random.fold_in(key, probe))
            return pullback(jnp.where(counted[..., None], scores, 0.0))

        probes = jax.lax.map(one_probe, jnp.arange(num_probes))
        return {path: s[..., 0].transpose(2, 1, 0) for path, s in probes.items()}

    return in_windows(traced, sketches, batch, counted, windows)


def shrinkage(sketch: np.ndarray, document: np.ndarray, num_documents: int) -> float:
    """The intensity lambda that correlations of different weights are shrunk by.

    A document's part of r_ij moves r_ij by x_ij - r_ij (x_ii + x_jj) / 2, x the products of its unit-scaled sketches
    (the delta method), and D documents make Var(r_ij) = D / (D - 1) times the sum of the squares of that.

    Args:
      sketch: `float64[windows, L, S, M]`.
      document: `int[windows]`.
      num_documents: D, those with outputs that count; at least 2.

    Returns:
      1 where the correlations are no larger than their noise; 0 where there are none, as of a single weight.
    """
    windows, rows, columns, probes = sketch.shape
    unit = _unit(np.moveaxis(sketch, 0, 2).reshape(rows * columns, windows * probes))
    r, squares = unit @ unit.T, np.zeros([rows * columns] * 2)
    unit = unit.reshape(-1, windows, probes)
    for number in np.unique(document):
        part = unit[:, document == number].reshape(len(unit), -1)
        products = part @ part.T
        alone = np.diag(products)
        squares += np.square(products - r * (alone[:, None] + alone) / 2)
    weight = np.repeat(np.arange(rows), columns)
    different = weight[:, None] != weight
    total = np.square(r[different]).sum()
    if total == 0:
        return 0.0
    return min(1.0, float(squares[different].sum() / total * num_documents / (num_documents - 1)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors along the last axis at length one; those of length 0 stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)
