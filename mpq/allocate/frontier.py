"""All non-dominated allocations from one exact solve, and the questions a person asks of them."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from mpq.allocate.problem import Problem
from mpq.allocate.search import Points, search
from mpq.types import Allocation, MpqError
from mpq.units import bpw_to_bits, format_bits, parse_size


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """The non-dominated (size, loss) points of a problem: no allocation is at least as good in both and better in one.

    Ties. Among allocations of equal size and equal loss (in `Problem.fixed_point`) the point stands for the one that
    is first when schemes are compared by their order in the problem, group by group, the group with the widest range
    of sizes first, groups of equal range by name. So the order in which the groups are given does not matter.

    Attributes:
      problem: what was solved.
      size_bits: `int64[P]`, ascending.
      loss: `float64[P]`, predicted loss increase, nats per token, descending.
      points: the search's result, from which choices are reconstructed.
    """

    problem: Problem
    size_bits: np.ndarray
    loss: np.ndarray
    points: Points

    def __len__(self) -> int:
        return len(self.size_bits)

    def __iter__(self) -> Iterator[Allocation]:
        """Every point as an allocation, smallest first."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Allocation:
        """The point `index` as an allocation for a budget of just its size."""
        position = range(len(self))[index]
        return self._allocation(position, int(self.size_bits[position]))

    def choices(self, index: np.ndarray) -> np.ndarray:
        """`int64[len(index), G]`: index of the scheme of each group at the points `index`."""
        return self.points.choices(np.asarray(index, np.int64))

    def choice_within(self, bits: int) -> np.ndarray:
        """`int64[G]`: index of the scheme of each group in the best allocation within `bits`, also above the largest.

        Raises:
          MpqError: below the smallest reachable size.
        """
        if bits < self.problem.min_bits:
            self.problem.check_budget(bits)
        return self.choices(np.array([self._index(bits)]))[0]

    def lower_bound(self, bits: int) -> float:
        """The least predicted loss within `bits`; no allocation that fits has a smaller one.

        Raises:
          MpqError: below the smallest reachable size.
        """
        if bits < self.problem.min_bits:
            self.problem.check_budget(bits)
        return float(self.loss[self._index(bits)])

    def at(
        self,
        *,
        bits: int | None = None,
        size: int | str | None = None,
        bpw: float | None = None,
        loss: float | None = None,
    ) -> Allocation:
        """The best allocation for one target; give exactly one.

        Args:
          bits: budget for the quantized weights in bits.
          size: budget for the file: bytes, or text such as "4MB" or "1.5MiB". Counts `Problem.overhead_bits`.
          bpw: budget in bits per quantized weight, everything stored for it counted.
          loss: the smallest allocation with at most this predicted loss increase, nats per token.

        Raises:
          MpqError: not exactly one target; a budget below the smallest reachable size or above the largest useful
            one; a loss below the best reachable one.
        """
        given = {
            name: value
            for name, value in (("bits", bits), ("size", size), ("bpw", bpw), ("loss", loss))
            if value is not None
        }
        if len(given) != 1:
            raise MpqError(f"give exactly one of bits, size, bpw and loss, not {', '.join(given) or 'none of them'}")
        if loss is not None:
            return self._at_loss(loss)
        if size is not None:
            bits = parse_size(size) - self.problem.overhead_bits
        elif bpw is not None:
            bits = bpw_to_bits(bpw, self.problem.num_weights)
        assert bits is not None
        budget_bits = self.problem.check_budget(bits)
        return self._allocation(self._index(budget_bits), budget_bits)

    def verify(self, chunk: int = 4096) -> None:
        """Recomputes size and loss of every point from its choice, in plain sums over the problem's own arrays.

        Raises:
          MpqError: a choice that is not allowed, a size that is off by a bit, a loss that is off by more than
            rounding, or a point that another one dominates.
        """
        problem, rows = self.problem, np.arange(len(self.problem.names))
        loss = np.where(problem.allowed, problem.loss, 0.0)
        # Fixed point rounds each loss by half a step and the total once; a float64 sum of G terms by G * 2^-53 of
        # their magnitudes.
        magnitude = float(np.abs(loss).max(axis=1).sum())
        tolerance = len(rows) * math.ldexp(0.5, problem.fixed_point[1]) + (len(rows) + 1) * 2.0**-53 * magnitude
        for start in range(0, len(self), chunk):
            index = np.arange(start, min(start + chunk, len(self)))
            choice = self.choices(index)
            wrong = ~problem.allowed[rows, choice].all(axis=1)
            wrong |= problem.size_bits[rows, choice].sum(axis=1) != self.size_bits[index]
            wrong |= ~(np.abs(loss[rows, choice].sum(axis=1) - self.loss[index]) <= tolerance)
            for point in index[wrong]:
                raise MpqError(
                    f"point {point} of the frontier does not hold: its choice does not give {self.size_bits[point]} "
                    f"bits and a predicted loss of {self.loss[point]}; the frontier is damaged, solve again"
                )
        if (np.diff(self.size_bits) <= 0).any() or (np.diff(self.loss) > 0).any():
            raise MpqError("the frontier is damaged: sizes must ascend and losses descend; solve again")

    def _index(self, budget_bits: int) -> int:
        return int(np.searchsorted(self.size_bits, budget_bits, side="right")) - 1

    def _at_loss(self, loss: float) -> Allocation:
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
            raise MpqError(f"loss {loss!r} is not a finite number of nats per token")
        index = int(np.searchsorted(-self.loss, -loss, side="left"))
        if index == len(self):
            size = format_bits(int(self.size_bits[-1]) + self.problem.overhead_bits)
            raise MpqError(
                f"no allocation has a predicted loss of {loss:g}: the best reachable is {self.loss[-1]:.9g} nats "
                f"per token, at {size}; allow more, or add a larger scheme"
            )
        return self._allocation(index, int(self.size_bits[index]))

    def _allocation(self, index: int, budget_bits: int) -> Allocation:
        choice = self.choices(np.array([index]))[0]
        _, fixed, _ = self.problem.evaluate(choice)
        return self.problem.allocation(choice, budget_bits=budget_bits, lower_bound=fixed, solver="exact")


def solve_frontier(problem: Problem, *, max_pairs: int = 1 << 26) -> Frontier:
    """All non-dominated points of a problem, proven complete (`search.py`).

    Losses are rounded once to the problem's fixed-point grid (`Problem.fixed_point`); on that grid the result is exact.

    Args:
      problem: what to solve.
      max_pairs: most pairs of partial allocations held at once, 32 bytes each.

    Raises:
      MpqError: `max_pairs` was exceeded.
    """
    fixed, exponent = problem.fixed_point
    points = search(problem.names, problem.size_bits, fixed, problem.allowed, max_pairs)
    rows = np.arange(len(problem.names))
    size_bits = problem.size_bits[rows, points.start].sum() + points.size * points.unit
    loss = np.ldexp((fixed[rows, points.start].sum() + points.loss).astype(np.float64), exponent)
    return Frontier(problem, size_bits, loss, points)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The optimum, from the whole frontier.

    Attributes:
      max_pairs: see `solve_frontier`.
    """

    max_pairs: int = 1 << 26
    name: str = dataclasses.field(default="exact", init=False)

    def solve(self, problem: Problem, budget_bits: int) -> Allocation:
        """The allocation of least predicted loss within `budget_bits`; of equals the smallest.

        Raises:
          MpqError: the budget is out of range (`Problem.check_budget`), or `max_pairs` was exceeded.
        """
        budget_bits = problem.check_budget(budget_bits)
        return solve_frontier(problem, max_pairs=self.max_pairs).at(bits=budget_bits)
