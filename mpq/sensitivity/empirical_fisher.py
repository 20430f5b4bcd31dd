"""Empirical Fisher: the quadratic form of the quantization error with the scores of the data's own labels.

    loss_increase = 1 / (2 N) * sum over spans ( sum_{t in span} s_t )^2,   s_t = x_t^T delta e_t   [nats per output]

where e = d(sum of losses at the data's labels) / dy at the weight's output and x is its input (`score_squares`). Only
the labels differ from `fisher`, which draws them from the model. Kunstner, Balles and Hennig 2019 (arXiv:1905.12558)
show what that changes: the second moment of gradients at given labels is the Fisher matrix only if the model is the
distribution of the labels and the data are many. Otherwise confident and right predictions count nothing, wrong
ones count by the square of their surprise, and at a minimum that fits the labels all of it vanishes while the Fisher
matrix does not. It is here because the practice of LLM quantization uses it (SqueezeLLM, Kim et al. 2023,
arXiv:2306.07629, its diagonal in the weights; ModelOpt's gradient score, its diagonal in the layers' outputs).

The scores of different positions do not have mean zero, so products of positions within a span stay: `span=None` is the
empirical Fisher matrix of whole windows, whose scores are their gradients; shorter spans leave out the products of
positions in different spans. It is deterministic.

Cost: one forward and one backward pass a batch that also makes the gradient of each span, half of `fisher` at its two
samples; a scheme then costs one multiply-add for every element of that gradient.
Fails on: models that fit their labels well or badly, as above; the square of the mean gradient, which a model away from
its minimum has, is counted as curvature; interactions. Tasks and data without targets are refused.

Differences from the paper: the form is evaluated on the error itself, without its diagonal or factors.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, require_targets
from mpq.sensitivity.score_squares import score_squares
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher:
    """Empirical Fisher quadratic form of the quantization error.

    Attributes:
      span: most positions that are summed before squaring; a window is cut into the fewest spans of equal length. 1:
        independent positions, None: the whole window.
    """

    span: int | None = 32

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`empirical_fisher`."""
        return "empirical_fisher"

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
          data: windows with their real labels.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one a batch.

        Raises:
          MpqError: no output counts, there are no targets, or a weight, a candidate or the model's outputs are not
            finite.
        """
        counts = check_inputs(model, traced.weights, data)
        require_targets(self.name, model, data)
        return score_squares(
            self.name,
            f"{self.name}(span={self.span})",
            model,
            traced,
            schemes,
            candidates,
            data,
            counts,
            _scores_of_data,
            num_samples=1,
            span=self.span,
            key=key,
            batch_size=batch_size,
            store=store,
        )


def _scores_of_data(task: Task, batch: Batch, outputs: jax.Array, windows: jax.Array, key: jax.Array) -> jax.Array:
    """Gradient in the outputs of the loss at the data's targets."""
    del windows, key
    targets = task.targets(batch.inputs, batch.labels)
    return jax.grad(lambda y: jnp.sum(task.loss(task.distribution(y), targets)))(outputs)
