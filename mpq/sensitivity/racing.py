"""Racing: measured KL where the plans of some budgets still hang on it, and no more of it where they do not.

A table of measured KL spends as much on a scheme that no plan would take as on one that a plan hangs on. Here all pairs
of weight and scheme run on one batch; then the windows double from round to round, and a round has an equal part of
what is left of `share`, which buys the new windows for the pairs that matter most. It is racing (Maron and Moore 1994,
*Hoeffding Races*, NIPS 6) in the schedule of successive halving (Jamieson and Talwalkar 2016, AISTATS).

**What matters.** At a price p per bit the knapsack falls apart into groups of weights, each of which takes the scheme
of least cost, loss + p * size. A scheme that costs d more than the one that the plan takes, with a standard error e
from n documents, may be the better one all the same; what is lost without it is on average (the linear loss of Chick
and Inoue 2001, *Operations Research* 49(5))

    e * ( (n - 1 + t^2) / (n - 2) * f(t) - t * (1 - F(t)) ),       t = d / e,

with density f and distribution F of Student's t with n - 1 degrees of freedom. p is the price of the hull segment that
the budget cuts (`mpq.allocate.lagrangian`), or of one of its neighbours, since it moves with the estimates. Differences
are *paired*: the same documents, windows that both schemes have seen.

**Unequal windows.** Hard windows are hard for all weights, and what a window does to a weight it does at every scheme.
A mean over few windows is therefore multiplied by mean(more) / mean(few) of the schemes of the same group that have
seen both, and beyond these of all pairs, step by step (a chain of ratio estimators, Cochran 1977, section 6.2): who
left early must not look cheap for having met easy windows.

The race ends when the plans at all budgets stayed the same for `patience` rounds and the regrets add up to at most
`tolerance` of a plan's loss, or when everything is spent. The plans are then the exact ones of the table.

Cost: at most `share` of measured KL's passes, the original's own beside them (and one batch for all pairs in any case);
an exact frontier a round.
Fails on: one document, whose errors are unknown; few and heavy-tailed documents, whose standard errors run low; budgets
other than those that it was run for, where entries are crude. Where windows differ little, a table of as many windows
for every pair does as well: `experiments/racing.py` measures both.

Differences from the papers: Hoeffding's bounds and elimination for good are replaced by the regret, found anew in every
round: a pair that left comes back when the price has moved, and catches up.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpq.allocate import solve_frontier
from mpq.data.dataset import by_document
from mpq.evaluate import Reference, counts_of
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, check_inputs, make_table, window_divergences
from mpq.sensitivity.one_by_one import Single
from mpq.sensitivity.race_field import Field, Measure
from mpq.trace import Trace
from mpq.types import MpqError, Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Raced:
    """What a race found, and what it cost.

    Attributes:
      mean: `float64[L, S]`, loss increase, nats per output.
      stderr: `float64[L, S]`, over the documents that the entry has seen.
      seen: `int64[L, S]`, windows that the entry has seen.
      windows_run: windows that ran through the model, over all candidates that change anything.
      windows_of_all: what they would have been, had every candidate seen all the data.
    """

    mean: np.ndarray
    stderr: np.ndarray
    seen: np.ndarray
    windows_run: int
    windows_of_all: int


@dataclasses.dataclass(frozen=True)
class Race:
    """Measured KL for the plans of some budgets.

    Attributes:
      budgets_bits: sizes of the quantized weights that plans are asked for.
      share: of the passes of the whole table, that may be spent.
      patience: rounds without a change of any plan, after which the race may end.
      tolerance: expected regret, as a fraction of a plan's loss, with which it then does.
      keep_bytes: most memory for the reference's outputs; above it they are computed again for every candidate.
    """

    budgets_bits: tuple[int, ...]
    share: float = 1 / 3
    tolerance: float = 0.005
    patience: int = 2
    keep_bytes: int = 1 << 30

    def __call__(
        self,
        model: Model,
        traced: Trace,
        schemes: Sequence[Scheme],
        candidates: CandidateSource,
        data: Dataset,
        *,
        batch_size: int,
        store: Store | None = None,
    ) -> tuple[SensitivityTable, Raced]:
        """Race all schemes of all weights.

        Args:
          model: gives the function and the original parameters.
          traced: gives the weights.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows to measure on: first one of every document, then a second, and so on.
          batch_size: windows per forward pass, and in the first round.
          store: finished items, one per weight, scheme and round.

        Returns:
          The table, and what it cost.

        Raises:
          MpqError: no budget, or one below the smallest size; no output counts, a weight is not finite, or the outputs
            of a candidate are not.
        """
        check_inputs(model, traced.weights, data)
        data = by_document(data)
        reference = Reference(model, data, batch_size, keep_bytes=self.keep_bytes)

        def divergences(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del spec
            batches = reference.batches(first // batch_size, -(-last // batch_size))
            return window_divergences(model, changed, batches)

        single = Single("kl", model, traced, candidates, data, divergences, batch_size, store, {})
        counts = counts_of(model.task, data)
        raced = self.of(single.windows, traced.weights, schemes, data.document, counts, batch_size)
        estimates = raced.mean, raced.stderr
        return make_table("kl(raced)", model, traced.weights, schemes, candidates, data, *estimates), raced

    def of(
        self,
        measure: Measure,
        weights: Sequence[WeightSpec],
        schemes: Sequence[Scheme],
        document: np.ndarray,
        counts: np.ndarray,
        batch_size: int,
    ) -> Raced:
        """The race itself, on any measurement.

        Args:
          measure: gives the numbers.
          weights: rows.
          schemes: columns.
          document: `int[windows]`.
          counts: `[windows]`, outputs that count.
          batch_size: windows of the first round.

        Raises:
          MpqError: no budget, or one below the smallest size.
        """
        if not self.budgets_bits:
            raise MpqError("a race needs the budgets that plans are asked for: give at least one size in bits")
        field = Field(measure, weights, schemes, document, counts)
        targets = _targets(batch_size, counts)
        contending, plans, unchanged = np.ones_like(field.problem.allowed), np.zeros(0, np.int64), 0
        for left, target in zip(range(len(targets), 0, -1), targets, strict=True):
            field.advance(contending, target)
            frontier = solve_frontier(field.posed())
            last, plans = plans, np.stack([frontier.choice_within(bits) for bits in self.budgets_bits])
            unchanged = unchanged + 1 if np.array_equal(plans, last) else 0
            regrets = np.stack([field.regrets(frontier, bits) for bits in self.budgets_bits])
            settled = regrets.sum(axis=(1, 2)).max() <= self.tolerance
            if left == 1 or (unchanged >= self.patience and settled):
                break
            purse = (self.share * field.windows_of_all - field.windows_run) / (left - 1)
            taken = (plans[..., None] == np.arange(len(schemes))).any(axis=0)
            contending = field.contenders(taken, regrets.max(axis=0), targets[-left + 1], purse)
        return Raced(*field.estimates(), field.seen, field.windows_run, field.windows_of_all)


def _targets(batch_size: int, counts: np.ndarray) -> list[int]:
    """Windows seen after each round; the first reaches to a batch in which something counts."""
    targets = [batch_size * (int(np.flatnonzero(counts)[0]) // batch_size + 1)]
    while targets[-1] < len(counts):
        targets.append(2 * targets[-1])
    return [min(target, len(counts)) for target in targets]
