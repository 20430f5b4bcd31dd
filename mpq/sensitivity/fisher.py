"""Monte Carlo Fisher: the quadratic form of the actual quantization error, from one backward pass a batch.

For a model with output distribution p the KL divergence of a small change delta of one weight is, to second order,

    KL(p_w || p_{w+delta})  ~=  1/2 delta^T F delta,
    F = sum_t E_{y ~ p(. | x_<t)} [ g_t(y) g_t(y)^T ],   g_t(y) = d log p(y | x_<t) / dw

summed over the predicted positions t. This is the type-II Fisher of the model's own distribution, not the empirical
Fisher of the data's labels (Kunstner, Balles and Hennig 2019, arXiv:1905.12558, say why that differs). Its factor at
the outputs of a position, F_t = S_t S_t^T, is known (`Task.fisher_root`), so no label is drawn: with random signs r_t,
the outputs' scores S_t r_t have second moment F_t. With e their pullback to the weight's output and x its input,

    s_t = x_t^T delta e_t,   and over all positions of a window   E[(sum_t s_t)^2] = delta^T F delta   exactly,

because the signs of different positions are independent and have mean zero. Labels drawn from the softmax have the same
second moment, but a confident model almost never draws the ones that matter; a square of signs has at most the kurtosis
of a normal variable.

That square has one degree of freedom a window, so it is noisy. `span` trades noise for a small bias: positions are
summed in spans of so many, the squares of the spans are added, and what is lost is the correlation between positions of
*different* spans:

    loss_increase = 1 / (2 N) * sum over spans ( sum_{t in span} s_t )^2          [nats per token, N predicted tokens]

`span=1` treats every position as independent (the "expand" setting of Eschenhagen et al. 2023, arXiv:2311.00636);
`span=None` is the whole window, unbiased. On two trained Llamas (64 and 128 wide) independent positions halved the loss
predicted for the value projections, whose errors the attention averages in phase, and whole windows had twice the
noise of spans of 32 (see `experiments/bench_sensitivity.py`).

A row with one output, such as an image, has one draw, and all positions of the row belong to its span.

Several uses of one weight, such as a tied embedding's lookup and head, add up inside s_t.

Cost: one forward pass, and for every sample one backward pass that also makes the gradient of each span; a scheme then
costs one multiply-add for every element of that gradient. Schemes whose candidate is the weight itself are left out.
Fails on: large errors, where the KL is no longer quadratic (at 2 bits typically 20 to 50 % low), and interactions.

Differences from the papers: signs for sampled labels; KFAC's factors are not formed, the form is evaluated on the error
itself, without an assumption that x and e are independent.
"""

import dataclasses
from collections.abc import Sequence

import jax

from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, random_scores
from mpq.sensitivity.score_squares import score_squares
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class Fisher:
    """Monte Carlo Fisher quadratic form of the quantization error.

    Attributes:
      num_samples: draws of the signs of every position; each costs one backward pass.
      span: most positions that are summed before squaring; a window is cut into the fewest spans of equal length. 1:
        independent positions, None: the whole window.
    """

    num_samples: int = 2
    span: int | None = 32

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`fisher`."""
        return "fisher"

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
          data: windows; their labels are not used.
          key: sample m of window w uses only `fold_in(fold_in(key, m), w)`: neither the batch size nor more samples or
            windows change what is drawn.
          batch_size: windows per pass.
          store: finished items, one a batch.

        Raises:
          MpqError: no output counts, or a weight, a candidate or the model's outputs are not finite.
        """
        counts = check_inputs(model, traced.weights, data)
        return score_squares(
            self.name,
            f"{self.name}(num_samples={self.num_samples}, span={self.span})",
            model,
            traced,
            schemes,
            candidates,
            data,
            counts,
            _scores,
            num_samples=self.num_samples,
            span=self.span,
            key=key,
            batch_size=batch_size,
            store=store,
        )


def _scores(task: Task, batch: Batch, outputs: jax.Array, windows: jax.Array, key: jax.Array) -> jax.Array:
    del batch
    return random_scores(task, outputs, windows, key)
