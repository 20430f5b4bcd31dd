"""Aumann-Shapley attribution: who caused the loss of the plan that puts all weights at one scheme (arXiv:2607.12266).

For a scheme s let Delta be the error of all weights at once. The loss of that plan is an integral along the straight
path to it, and its gradient divides it among the weights (Aumann and Shapley 1974, *Values of Non-Atomic Games*):

    phi[l, s]  =  integral_0^1 < grad_l KL(p_w || p_{w + t Delta}), delta_l > dt,     sum_l phi[l, s] = KL at t = 1

in nats per output, by Gauss-Legendre quadrature with `num_nodes` nodes, exact for a KL that is a polynomial of degree 2
`num_nodes` in t. Interactions are shared out, half of a pair's to each of the two, so that the column adds up to what
the plan really costs, where a sum of losses measured one at a time does not. An entry may be negative: the weight
undoes some of what the others do. It needs no labels.

An entry is about its weight in that company: a mixed plan puts the others elsewhere, so that each of the attributions
it adds up was made in another plan than itself.

Cost: one forward and backward pass for every node and scheme, whatever the number of weights, and the reference.
Fails on: plans far from uniform; KL that is no low polynomial along the path, at 2 bits, where more nodes help.

Differences from the paper: error bars over documents, from the attribution of every window; all weights of the table
take part, with no grouping of layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    candidates_digest,
    check_inputs,
    measured_on,
)
from mpq.sensitivity.by_batch import table_of_windows
from mpq.sensitivity.errors import Errors, differing_errors
from mpq.sensitivity.gradients import divergence_slopes
from mpq.sensitivity.taps import require_finite_windows, telling_windows
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class AumannShapley:
    """Aumann-Shapley attribution of uniform plans.

    Attributes:
      num_nodes: of the quadrature along the path.
      keep_bytes: most memory for the reference's outputs; above it the reference runs again for every node and scheme.
    """

    num_nodes: int = 3
    keep_bytes: int = 1 << 30

    coupling = Coupling.COLUMN

    @property
    def name(self) -> str:
        """`aumann_shapley`."""
        return "aumann_shapley"

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
        """Attribute the loss of every uniform plan to the weights.

        Args:
          model: gives the function and the original parameters.
          traced: the model's trace; all its weights take part.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows; their labels are not used.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one a scheme and node.

        Raises:
          MpqError: no output counts, or a weight, a candidate or the model's outputs are not finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
        reference = Reference(model, data, batch_size, keep_bytes=self.keep_bytes)
        nodes, shares = np.polynomial.legendre.leggauss(self.num_nodes)
        on = measured_on(model, traced, data, batch_size)
        windows = np.zeros((len(data.inputs), len(traced.weights), len(schemes)))
        keep = np.zeros(windows.shape[1:], bool)
        for column, scheme in enumerate(track(schemes, "sensitivity aumann_shapley", len(schemes))):
            keep[:, [column]], errors = differing_errors(model.params, traced, [scheme], candidates)
            if not errors:
                continue
            among = candidates_digest(traced.weights, [scheme], candidates)
            for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
                make = functools.partial(_slopes, shaped, model, node, errors, reference, keep[:, [column]])
                values = kept(store, make, item=self.name, **on, node=node, candidates=among)
                windows[..., column] += share * np.asarray(values, np.float64)
        require_finite_windows(windows, keep, model, data.source)
        label = f"{self.name}(num_nodes={self.num_nodes})"
        return table_of_windows(label, model, traced, schemes, candidates, data, counts, windows, keep)


def on_path(params: Params, weights: Sequence[WeightSpec], errors: Errors, t: float) -> dict[str, jax.Array]:
    """`params` with t times its error added to every weight.

    Args:
      params: the original parameters.
      weights: all of them.
      errors: of one candidate a weight.
      t: where on the path, 0 to 1.
    """
    changed = dict(params)
    for spec in weights:
        if spec.path in errors:
            matrix = spec.to_matrix(params[spec.param]) + np.float32(t) * errors[spec.path].matrices()[0]
            changed = spec.write(changed, matrix)
    return changed


def _slopes(
    traced: Trace, model: Model, node: float, errors: Errors, reference: Reference, keep: np.ndarray
) -> list[Any]:
    """`float64[windows, weights]`: derivative of each window's KL along the error of each weight, at `node`, nats."""
    params = on_path(model.params, traced.weights, errors, node)
    return divergence_slopes(traced, params, errors, reference, keep)[..., 0].tolist()
