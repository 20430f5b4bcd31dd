"""Limits beside the size: whatever adds up over groups of weights, in whole numbers of some unit.

BOPs are those of Baskin et al. 2018 (arXiv:1804.10969), without the terms of the accumulator: the multiply-accumulates
of a weight, times the bits of its elements, times the bits of what it multiplies. Latency adds up measured times of
single multiplications, as HAQ does (Wang et al. 2019, arXiv:1811.08886): it knows nothing of overlap.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mpq.allocate.problem import Problem
from mpq.allocate.rules import join
from mpq.types import Allocation, MpqError, WeightSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """A limit on a cost that adds up over groups.

    Attributes:
      name: for a person: `BOPs`, `latency`.
      unit: of cost and limit: `bit operations`, `ns`.
      cost: `int64[G, S]`, not negative; entries have no meaning where the problem does not allow the scheme.
      limit: most that all groups may take together.
    """

    name: str
    unit: str
    cost: np.ndarray
    limit: int

    def check(self, problem: Problem) -> None:
        """Whether it is a constraint on this problem, and can be met alone.

        Raises:
          MpqError: costs of another shape or type, a negative cost, or a limit below the smallest reachable value.
        """
        if self.cost.dtype != np.int64 or self.cost.shape != problem.loss.shape:
            raise MpqError(
                f"cost of {self.name} is {self.cost.dtype}{list(self.cost.shape)}: it must be "
                f"int64{list(problem.loss.shape)}, [groups, schemes]"
            )
        for row, column in np.argwhere(problem.allowed & (self.cost < 0)):
            raise MpqError(
                f"{self.name} of {problem.names[row]} at {problem.schemes[column]} is {self.cost[row, column]} "
                f"{self.unit}: a cost is not negative"
            )
        least = self.least(problem)
        if least > self.limit:
            raise MpqError(
                f"{self.name} of at most {self.limit:,} {self.unit} cannot be met: the smallest reachable is "
                f"{least:,}; raise the limit, or add a scheme that takes less"
            )

    def least(self, problem: Problem) -> int:
        """The smallest reachable value."""
        return sum(np.where(problem.allowed, self.cost, np.iinfo(np.int64).max).min(axis=1).tolist())

    def total(self, choice: np.ndarray) -> int:
        """The value of one scheme index per group, in exact integers."""
        return sum(self.cost[np.arange(len(choice)), choice].tolist())

    def of(self, problem: Problem, allocation: Allocation) -> int:
        """The value of an allocation."""
        return self.total(problem.by_group(allocation.choice))


def bops(problem: Problem, limit: float, activation_bits: int = 16) -> Constraint:
    """At most `limit` bit operations in one evaluation of the traced inputs.

    Raises:
      MpqError: the limit or the bits are no positive number.
    """
    bits = _positive("activation bits", activation_bits, 1)
    cost = [
        [sum(spec.macs for spec in group) * scheme.format.bits * bits for scheme in problem.schemes]
        for group in problem.members
    ]
    return Constraint("BOPs", "bit operations", np.array(cost, np.int64), _positive("limit of BOPs", limit, 1))


def peak_memory(problem: Problem, limit_bits: int, beside_bits: int) -> Constraint:
    """At most `limit_bits` while the model runs: all weights as stored, and what lies beside them.

    Args:
      problem: its `overhead_bits` count.
      limit_bits: of the device.
      beside_bits: activations, caches, and the largest weight dequantized, all at their peak: they are taken to be the
        same whatever is chosen.
    """
    return Constraint("peak memory", "bits", problem.size_bits, limit_bits - beside_bits - problem.overhead_bits)


def latency(problem: Problem, table: Mapping[str, Mapping[str, float]], limit_us: float) -> Constraint:
    """At most `limit_us` microseconds for all multiplications, one after the other.

    Times are counted in nanoseconds, rounded up. A stack of matrices takes one multiplication each; a look-up in an
    embedding takes no time.

    Args:
      problem: the weights.
      table: `{"kxn": {scheme: microseconds}}`, measured on the device, for every shape and scheme that may be chosen.
      limit_us: microseconds.

    Raises:
      MpqError: the table lacks an entry, an entry is no time, or the limit is no positive number.
    """
    for shape, times in table.items():
        if not isinstance(times, Mapping):
            raise MpqError(f"the latency table has {times!r} for {shape}: it must be an object, scheme to microseconds")
    cost = np.zeros(problem.loss.shape, np.int64)
    missing: dict[str, None] = {}
    for row, column in np.argwhere(problem.allowed):
        text = str(problem.schemes[column])
        for spec in problem.members[row]:
            if times := _multiplications(spec):
                shape = f"{spec.k}x{spec.n}"
                if text not in table.get(shape, {}):
                    missing[f"{text} of {shape} ({spec.path})"] = None
                    continue
                cost[row, column] += times * _nanoseconds(f"{text} of {shape}", table[shape][text])
    if missing:
        raise MpqError(
            f"the latency table lacks {join(list(missing), 8)}: measure them, or exclude the schemes with --only"
        )
    return Constraint("latency", "ns", cost, _positive("limit of latency", limit_us, 1000))


def _multiplications(spec: WeightSpec) -> int:
    return spec.batch * sum(use.kind != "embedding" for use in spec.uses)


def _nanoseconds(what: str, microseconds: Any) -> int:
    if not _is_number(microseconds) or microseconds < 0:
        raise MpqError(f"the latency table has {microseconds!r} for {what}: it must be a time in microseconds")
    return math.ceil(Fraction(repr(microseconds)) * 1000)  # of the decimal that was written, as in `mpq.units`


def _positive(what: str, value: Any, factor: int) -> int:
    whole = math.floor(Fraction(repr(value)) * factor) if _is_number(value) else 0
    if whole < 1:
        raise MpqError(f"{what} {value!r} is not a positive number: give for instance 1000")
    return whole


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
