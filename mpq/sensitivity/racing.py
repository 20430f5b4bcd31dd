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
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from mpq.allocate import Frontier, Problem, solve_frontier
from mpq.allocate.hull import group_hulls
from mpq.data.dataset import by_document
from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference, counts_of
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, check_inputs, make_table, window_divergences
from mpq.sensitivity.one_by_one import Single
from mpq.trace import Trace
from mpq.types import MpqError, Params, Scheme, SensitivityTable, WeightSpec

Measure = Callable[[WeightSpec, Scheme, int, int], Sequence[float]]
"""`(weight, scheme, first, last) -> [last - first]`: the loss increase of each window, summed over its outputs."""


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

        single = Single("kl", model, traced, candidates, data, divergences, batch_size, store)
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
        field = _Field(measure, weights, schemes, document, counts)
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
        return field.result()


def _targets(batch_size: int, counts: np.ndarray) -> list[int]:
    """Windows seen after each round; the first reaches to a batch in which something counts."""
    targets = [batch_size * (int(np.flatnonzero(counts)[0]) // batch_size + 1)]
    while targets[-1] < len(counts):
        targets.append(2 * targets[-1])
    return [min(target, len(counts)) for target in targets]


class _Field:
    """What has been measured so far, and what follows from it."""

    def __init__(
        self,
        measure: Measure,
        weights: Sequence[WeightSpec],
        schemes: Sequence[Scheme],
        document: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        nothing = np.zeros((len(weights), len(schemes)))
        table = SensitivityTable(tuple(weights), tuple(schemes), nothing, nothing, "kl", "", "", "")
        self.problem = Problem.from_table(table)
        self._measure, self._weights, self._schemes = measure, weights, schemes
        self._document, self._counts = document, np.asarray(counts, np.float64)
        self._outputs = np.concatenate([[0.0], np.cumsum(self._counts)])  # of the first n windows
        self._group = np.array([self.problem.names.index(spec.group) for spec in weights])
        self._sums = np.zeros((len(counts), *nothing.shape))
        self._seen = np.zeros(nothing.shape, np.int64)
        self._factors: list[dict[int, float]] = []
        self.windows_run = 0

    def advance(self, contending: np.ndarray, target: int) -> None:
        """Measure contenders, `bool[G, S]`, up to window `target`."""
        for row, column in np.argwhere(contending[self._group] & (self._seen < target)):
            first = int(self._seen[row, column])
            values = np.asarray(self._measure(self._weights[row], self._schemes[column], first, target))
            self._sums[first:target, row, column] = values
            self._seen[row, column] = target
            self.windows_run += len(values) if values.any() else 0
        self._factors = self._chains()

    def posed(self) -> Problem:
        """The knapsack with the present estimates."""
        loss = np.zeros_like(self.problem.loss)
        np.add.at(loss, self._group, self._means())
        return dataclasses.replace(self.problem, loss=loss)

    def regrets(self, frontier: Frontier, bits: int) -> np.ndarray:
        """`float64[G, S]`: what it costs on average not to know an entry better, as a fraction of the plan's loss."""
        problem, regret = frontier.problem, np.zeros(frontier.problem.loss.shape)
        prices = _prices(problem, bits)
        for group, taken in enumerate(frontier.choice_within(bits)):
            loss, error, documents = self._differences(group, int(taken))
            size = problem.size_bits[group] - problem.size_bits[group, taken]
            behind = np.maximum(loss + np.outer(prices, size), 0.0)
            regret[group] = expected_regret(behind, error, documents).max(axis=0)
        return regret / max(abs(frontier.lower_bound(bits)), np.finfo(np.float64).tiny)

    def contenders(self, taken: np.ndarray, regret: np.ndarray, target: int, purse: float) -> np.ndarray:
        """The entries of largest regret, and those that they are compared with, as far as a purse goes.

        Args:
          taken: `bool[G, S]`, what a plan holds.
          regret: `float64[G, S]`.
          target: window up to which they would be measured.
          purse: windows that may run.

        Returns:
          `bool[G, S]`.
        """
        cost, chosen = np.zeros(regret.shape), np.zeros(regret.shape, bool)
        np.add.at(cost, self._group, np.where(self._changes(), target - self._seen, 0))
        order = np.unravel_index(np.argsort(-regret, axis=None, kind="stable"), regret.shape)
        for group, scheme in zip(*order, strict=True):
            more = taken[group] & ~chosen[group]
            more[scheme] = not chosen[group, scheme]
            purse -= cost[group, more].sum()
            if purse < 0 or regret[group, scheme] == 0:
                break
            chosen[group] |= more
        return chosen

    def result(self) -> Raced:
        """Estimates and costs."""
        stderr = np.zeros(self._seen.shape)
        for n in np.unique(self._seen):
            at = self._seen == n
            stderr[at] = self._over_documents(self._sums[:n, at])[1]
        stderr = np.where(
            self._changes(), stderr * self._factor(), 0.0
        )  # an exact candidate costs nothing: that is certain
        return Raced(self._means(), stderr, self._seen, self.windows_run, self.windows_of_all)

    @property
    def windows_of_all(self) -> int:
        """What all candidates that change something would take on all the data."""
        return int(self._changes().sum()) * len(self._counts)

    def _changes(self) -> np.ndarray:
        """`bool[L, S]`, which candidates change the outputs."""
        return (self._sums != 0).any(axis=0)

    def _means(self) -> np.ndarray:
        """`float64[L, S]`, nats per output, of all windows that any candidate has seen."""
        return self._sums.sum(axis=0) / self._outputs[self._seen] * self._factor()

    def _factor(self) -> np.ndarray:
        """`float64[L, S]`, what a mean over the windows that an entry has seen is multiplied by."""
        rows = zip(self._group, self._seen, strict=True)
        return np.array([[self._factors[group][n] for n in seen] for group, seen in rows])

    def _chain(self, sums: np.ndarray, seen: np.ndarray) -> dict[int, float]:
        """By windows seen, the mean over the most windows that an entry has seen over the mean over these.

        A product over the steps in between, each from the entries that took it.

        Args:
          sums: `float64[windows, entries]`.
          seen: `int64[entries]`.
        """
        levels = np.unique(seen).tolist()
        factors = {levels[-1]: 1.0}
        for few, more in reversed([*itertools.pairwise(levels)]):
            of_both = sums[:, seen >= more].sum(axis=1)
            means = [of_both[:n].sum() / self._outputs[n] for n in (few, more)]
            factors[few] = factors[more] * (means[1] / means[0] if min(means) > 0 else 1.0)
        return factors

    def _chains(self) -> list[dict[int, float]]:
        """The same for every group: by its own entries as far as the longest of them, from there by those of all."""
        of_all = self._chain(self._sums.reshape(len(self._sums), -1), self._seen.ravel())
        chains = []
        for group in range(len(self.problem.names)):
            seen = self._seen[self._group == group][0]
            own = self._chain(self._sums[:, self._group == group].sum(axis=1), seen)
            chains.append({n: factor * of_all[int(seen.max())] for n, factor in own.items()})
        return chains

    def _differences(self, group: int, best: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss of a group's schemes minus that of `best`, standard errors, and of how many documents; each `[S]`."""
        sums = self._sums[:, self._group == group].sum(axis=1)
        seen = self._seen[self._group == group][0]
        common = np.minimum(seen, seen[best])
        mean, error, documents = np.zeros((3, len(seen)))
        for n in np.unique(common):
            at = common == n
            difference = self._over_documents(sums[:n, at] - sums[:n, [best]])
            mean[at], error[at] = (self._factors[group][n] * value for value in difference)
            documents[at] = len(np.unique(self._document[:n][self._counts[:n] > 0]))
        return mean, error, documents

    def _over_documents(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of sums over the first windows."""
        document = self._document[: len(sums)]
        counts = sums_over_documents(self._counts[: len(sums)], document)
        return mean_over_documents(sums_over_documents(sums, document), counts)


def expected_regret(behind: np.ndarray, error: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """What is lost on average by going without a scheme, formula in the module's docstring.

    Args:
      behind: estimate of how much worse it is, not negative.
      error: its standard error; 0: it is certain, NaN: nothing is known.
      documents: that both come from; of two or fewer nothing is known.
    """
    unknown, certain = np.isnan(error) | ((error > 0) & (documents <= 2)), error == 0
    freedom = np.maximum(documents - 1.0, 2.0)
    t = behind / np.where(unknown | certain, 1.0, error)
    loss = (freedom + t**2) / (freedom - 1) * stats.t.pdf(t, freedom) - t * stats.t.sf(t, freedom)
    return np.where(unknown, np.inf, np.where(certain, 0.0, error * loss))


def _prices(problem: Problem, bits: int) -> list[float]:
    """Nats per bit of the hull segment that a budget cuts, and of its neighbours; 0 where nothing is left to buy."""
    hulls = group_hulls(problem.size_bits, problem.fixed_point[0], problem.allowed)
    order = np.argsort(-hulls.slope, kind="stable")
    cut = int(np.searchsorted(np.cumsum(hulls.width[order]), bits - problem.min_bits, side="right"))
    slopes = [*hulls.slope[order], 0.0]
    return [problem.to_loss(1) * slope for slope in slopes[max(cut - 1, 0) : cut + 2]]
