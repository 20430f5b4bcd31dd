"""The state of a race (formulas: `mpq.sensitivity.racing`): what was measured, and what follows from it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from mpq.allocate import Frontier, Problem
from mpq.allocate.hull import group_hulls
from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.types import Scheme, SensitivityTable, WeightSpec

Measure = Callable[[WeightSpec, Scheme, int, int], Sequence[float]]
"""`(weight, scheme, first, last) -> [last - first]`: the loss increase of each window, summed over its outputs."""


class Field:
    """Sums of every window and entry, and what follows from them: the problem as it stands, regrets, contenders."""

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
        self.seen = np.zeros(nothing.shape, np.int64)
        self._factors: list[dict[int, float]] = []
        self.windows_run = 0

    def advance(self, contending: np.ndarray, target: int) -> None:
        """Measure contenders, `bool[G, S]`, up to window `target`."""
        for row, column in np.argwhere(contending[self._group] & (self.seen < target)):
            first = int(self.seen[row, column])
            values = np.asarray(self._measure(self._weights[row], self._schemes[column], first, target))
            self._sums[first:target, row, column] = values
            self.seen[row, column] = target
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
        np.add.at(cost, self._group, np.where(self._changes(), target - self.seen, 0))
        order = np.unravel_index(np.argsort(-regret, axis=None, kind="stable"), regret.shape)
        for group, scheme in zip(*order, strict=True):
            more = taken[group] & ~chosen[group]
            more[scheme] = not chosen[group, scheme]
            purse -= cost[group, more].sum()
            if purse < 0 or regret[group, scheme] == 0:
                break
            chosen[group] |= more
        return chosen

    def estimates(self) -> tuple[np.ndarray, np.ndarray]:
        """`float64[L, S]` means and their standard errors, nats per output."""
        stderr = np.zeros(self.seen.shape)
        for n in np.unique(self.seen):
            at = self.seen == n
            stderr[at] = self._over_documents(self._sums[:n, at])[1]
        stderr = np.where(
            self._changes(), stderr * self._factor(), 0.0
        )  # an exact candidate costs nothing: that is certain
        return self._means(), stderr

    @property
    def windows_of_all(self) -> int:
        """What all candidates that change something would take on all the data."""
        return int(self._changes().sum()) * len(self._counts)

    def _changes(self) -> np.ndarray:
        """`bool[L, S]`, which candidates change the outputs."""
        return (self._sums != 0).any(axis=0)

    def _means(self) -> np.ndarray:
        """`float64[L, S]`, nats per output, of all windows that any candidate has seen."""
        return self._sums.sum(axis=0) / self._outputs[self.seen] * self._factor()

    def _factor(self) -> np.ndarray:
        """`float64[L, S]`, what a mean over the windows that an entry has seen is multiplied by."""
        rows = zip(self._group, self.seen, strict=True)
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
        of_all = self._chain(self._sums.reshape(len(self._sums), -1), self.seen.ravel())
        chains = []
        for group in range(len(self.problem.names)):
            seen = self.seen[self._group == group][0]
            own = self._chain(self._sums[:, self._group == group].sum(axis=1), seen)
            chains.append({n: factor * of_all[int(seen.max())] for n, factor in own.items()})
        return chains

    def _differences(self, group: int, best: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss of a group's schemes minus that of `best`, standard errors, and of how many documents; each `[S]`."""
        sums = self._sums[:, self._group == group].sum(axis=1)
        seen = self.seen[self._group == group][0]
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
    order, cut = hulls.taken(bits - problem.min_bits)
    slopes = [*hulls.slope[order], 0.0]
    return [problem.to_loss(1) * slope for slope in slopes[max(cut - 1, 0) : cut + 2]]
