"""The multiple-choice knapsack: one scheme for every fused group of weights, least predicted loss within a size.

    minimise   sum_g loss[g, x_g]     subject to   sum_g size_bits[g, x_g] <= budget,   allowed[g, x_g]

Kellerer, Pferschy, Pisinger 2004, *Knapsack Problems*, chapter 11. Sizes are integers and stay integers. Losses are
floats, whose sums depend on the order of summation; so solvers work on a fixed-point copy (`Problem.fixed_point`), on
which sums are exact, ties are ties, and every order of groups gives the same answer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpq.allocate.rules import Only, Pins, allowed_schemes, join
from mpq.types import Allocation, MpqError, Scheme, SensitivityTable, Status, WeightSpec
from mpq.units import format_bits, format_bpw

FIXED_POINT_BITS = 60


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What the solvers solve.

    Attributes:
      names: of the G groups.
      members: weights of each group; they share the scheme.
      schemes: the S candidates.
      loss: `float64[G, S]`, predicted loss increase of the whole group, nats per token. May be negative, need not be
        monotone.
      variance: `float64[G, S]`, squared standard error of `loss`; NaN: unknown, as for losses of a single document.
      size_bits: `int64[G, S]`, exact stored size of the whole group.
      allowed: `bool[G, S]`; entries of the arrays above have no meaning where False.
      paths: of all weights, in the order of the table; empty: in the order of the groups.
      overhead_bits: what the file holds whatever is chosen (norms, headers). A budget given as a file size counts it;
        `size_bits` and bits per weight do not.
    """

    names: tuple[str, ...]
    members: tuple[tuple[WeightSpec, ...], ...]
    schemes: tuple[Scheme, ...]
    loss: np.ndarray
    variance: np.ndarray
    size_bits: np.ndarray
    allowed: np.ndarray
    paths: tuple[str, ...] = ()
    overhead_bits: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.names), len(self.schemes))
        for field, dtype in (
            ("loss", np.float64),
            ("variance", np.float64),
            ("size_bits", np.int64),
            ("allowed", np.bool_),
        ):
            array = getattr(self, field)
            if array.dtype != dtype or array.shape != shape:
                expected = f"{np.dtype(dtype).name}{list(shape)}"
                raise MpqError(
                    f"problem.{field} is {array.dtype}{list(array.shape)}: it must be {expected}, [groups, schemes]"
                )
        if not self.names or len(self.members) != len(self.names) or len(set(self.names)) != len(self.names):
            raise MpqError(
                f"{len(self.names)} names for {len(self.members)} groups: give every group one name of its own"
            )
        for row in np.flatnonzero(~self.allowed.any(axis=1)):
            raise MpqError(f"no scheme is allowed for {self.names[row]}: allow at least one of {join(self.schemes)}")
        bad = self.allowed & ~(np.isfinite(self.loss) & ~np.isinf(self.variance) & ~(self.variance < 0))
        for row, column in np.argwhere(bad):
            raise MpqError(
                f"predicted loss of {self.names[row]} at {self.schemes[column]} is {self.loss[row, column]} with "
                f"variance {self.variance[row, column]}: the loss must be finite, the variance finite or NaN, which is "
                "unknown, and not negative; look at this weight's sensitivity"
            )
        if (self.allowed & (self.size_bits < 0)).any():
            raise MpqError("a size is negative: sizes are bits")

    @classmethod
    def from_table(
        cls,
        table: SensitivityTable,
        *,
        pins: Pins | None = None,
        only: Only | None = None,
        overhead_bits: int = 0,
        stored_bits: Callable[[WeightSpec, Scheme], int] = WeightSpec.size_bits,
    ) -> "Problem":
        """The problem that a sensitivity table poses: losses, variances and sizes summed over each fused group.

        Variances add up as if the errors of different weights were independent.

        Args:
          table: rows are weights, columns schemes.
          pins: regular expression that matches a whole weight path -> the scheme it must take; its fused group follows.
          only: regular expression -> the schemes it may take; where several match, what they have in common.
          overhead_bits: see the class.
          stored_bits: size of a weight under a scheme, where a runtime stores it otherwise.

        Raises:
          MpqError: a loss is NaN or infinite, or a standard error infinite; a pattern matches nothing or is no regular
            expression, a scheme is not in the table, or the rules leave a group no scheme.
        """
        _check_table(table)
        groups: dict[str, list[int]] = {}
        for row, spec in enumerate(table.weights):
            groups.setdefault(spec.group, []).append(row)
        rows = list(groups.values())
        size_bits = np.array([[stored_bits(w, scheme) for scheme in table.schemes] for w in table.weights], np.int64)
        total = lambda array: np.stack([array[index].sum(axis=0) for index in rows])
        return cls(
            names=tuple(groups),
            members=tuple(tuple(table.weights[i] for i in index) for index in rows),
            schemes=table.schemes,
            loss=total(table.loss_increase),
            variance=total(table.stderr**2),
            size_bits=total(size_bits),
            allowed=allowed_schemes(table, rows, pins or {}, only or {}),
            paths=tuple(spec.path for spec in table.weights),
            overhead_bits=overhead_bits,
        )

    @functools.cached_property
    def num_weights(self) -> int:
        """Number of quantized elements."""
        return sum(spec.size for group in self.members for spec in group)

    @functools.cached_property
    def errors_known(self) -> bool:
        """Whether every loss that may be chosen has a standard error."""
        return not np.isnan(self.variance[self.allowed]).any()

    @functools.cached_property
    def min_bits(self) -> int:
        """Smallest reachable size."""
        return int(np.where(self.allowed, self.size_bits, np.iinfo(np.int64).max).min(axis=1).sum())

    @functools.cached_property
    def max_bits(self) -> int:
        """Size of the most generous allocation: every group at its largest allowed scheme."""
        return int(np.where(self.allowed, self.size_bits, -1).max(axis=1).sum())

    @functools.cached_property
    def fixed_point(self) -> tuple[np.ndarray, int]:
        """Losses as integers: `(int64[G, S], exponent)` with `loss ~= integer * 2**exponent`, 0 where not allowed.

        The step is 2^-60 of the sum over groups of the largest |loss| (to a power of two), so no sum overflows, and
        each loss is rounded once, by at most half a step: a float64 sum of the same losses rounds more coarsely
        (2^-53).
        """
        loss = np.where(self.allowed, self.loss, 0.0)
        try:
            scale = math.fsum(np.abs(loss).max(axis=1))
        except OverflowError:
            scale = math.inf
        if not math.isfinite(scale):
            raise MpqError("the predicted losses are too large to be added: their sum exceeds 1e308")
        exponent = math.frexp(scale)[1] - FIXED_POINT_BITS
        return np.rint(np.ldexp(loss, -exponent)).astype(np.int64), exponent

    def to_loss(self, fixed: int) -> float:
        """Nats per token of a fixed-point sum; rounding to float64 keeps the order."""
        return math.ldexp(fixed, self.fixed_point[1])

    def format_size(self, bits: int) -> str:
        """Size for a person: bytes of the file (what is stored whatever is chosen included) and bits per weight."""
        always = f", {format_bits(self.overhead_bits)} of them whatever is chosen" if self.overhead_bits else ""
        per_weight = f", {format_bpw(bits, self.num_weights)}" if self.num_weights else ""
        return f"{format_bits(bits + self.overhead_bits)}{always}{per_weight}"

    def check_budget(self, budget_bits: int) -> int:
        """`budget_bits` as an int.

        Raises:
          MpqError: it is not a whole number, below the smallest reachable size, or above the most generous allocation.
        """
        if isinstance(budget_bits, bool | np.bool_) or not isinstance(budget_bits, int | np.integer):
            raise MpqError(f"budget {budget_bits!r} is not a whole number of bits")
        budget_bits = int(budget_bits)
        if budget_bits < self.min_bits:
            raise MpqError(
                f"budget of {self.format_size(budget_bits)} is below the smallest reachable size, "
                f"{self.format_size(self.min_bits)}: raise it, or add a smaller scheme"
            )
        if budget_bits > self.max_bits:
            raise MpqError(
                f"budget of {self.format_size(budget_bits)} is above the largest useful size, "
                f"{self.format_size(self.max_bits)} (every weight at its largest scheme): lower it, or add a larger "
                "scheme"
            )
        return budget_bits

    def evaluate(self, choice: Sequence[int] | np.ndarray) -> tuple[int, int, float]:
        """Size in bits, loss in fixed point and standard error in nats (NaN: unknown) of one scheme index per group.

        Raises:
          MpqError: a scheme is chosen where it is not allowed.
        """
        index = np.asarray(choice, np.int64)
        rows = np.arange(len(self.names))
        for row in np.flatnonzero(~self.allowed[rows, index]):
            raise MpqError(f"{self.schemes[index[row]]} is not allowed for {self.names[row]}")
        fixed = int(self.fixed_point[0][rows, index].sum())
        return int(self.size_bits[rows, index].sum()), fixed, math.sqrt(math.fsum(self.variance[rows, index]))

    def parts(self, choices: np.ndarray) -> np.ndarray:
        """Losses of the groups' choices: `int[..., G]` indices of schemes to `float64[..., G]`."""
        return self.loss[np.arange(len(self.names)), choices]

    def by_path(self, choice: Sequence[int] | np.ndarray) -> dict[str, Scheme]:
        """Path -> scheme, of one scheme index per group."""
        schemes = {
            spec.path: self.schemes[int(index)]
            for group, index in zip(self.members, choice, strict=True)
            for spec in group
        }
        return {path: schemes[path] for path in self.paths or schemes}

    def by_group(self, choice: Mapping[str, Scheme]) -> np.ndarray:
        """`int64[G]`, scheme index of every group; inverse of `by_path`.

        Raises:
          MpqError: a weight has no scheme, or one that is not among the problem's.
        """
        column = {str(scheme): index for index, scheme in enumerate(self.schemes)}
        chosen = [column.get(str(choice.get(group[0].path))) for group in self.members]
        for group, index in zip(self.members, chosen, strict=True):
            if index is None:
                raise MpqError(
                    f"the plan gives {group[0].path} {choice.get(group[0].path)}, which is none of the problem's "
                    f"schemes {join(self.schemes)}: solve it from this table"
                )
        return np.array(chosen, np.int64)

    def allocation(
        self, choice: Sequence[int] | np.ndarray, *, budget_bits: int, lower_bound: int, solver: str
    ) -> Allocation:
        """The `Allocation` of one scheme index per group; `lower_bound` in fixed point.

        Raises:
          MpqError: see `evaluate`; or the choice exceeds the budget.
        """
        size_bits, fixed, stderr = self.evaluate(choice)
        if size_bits > budget_bits:
            raise MpqError(
                f"{solver}: the choice takes {self.format_size(size_bits)}, more than {self.format_size(budget_bits)}"
            )
        return Allocation(
            choice=self.by_path(choice),
            loss=self.to_loss(fixed),
            stderr=stderr,
            size_bits=size_bits,
            budget_bits=budget_bits,
            lower_bound=self.to_loss(lower_bound),
            status=Status.OPTIMAL if fixed <= lower_bound else Status.FEASIBLE,
            solver=solver,
        )


def _check_table(table: SensitivityTable) -> None:
    shape = (len(table.weights), len(table.schemes))
    for name, array in (("loss_increase", table.loss_increase), ("stderr", table.stderr)):
        if array.shape != shape or not table.weights or not table.schemes:
            raise MpqError(
                f"sensitivity table: {name} has shape {array.shape} for {shape[0]} weights and {shape[1]} schemes"
            )
        unknown = np.isnan(array) if name == "stderr" else np.zeros(shape, np.bool_)
        for row, column in np.argwhere(~np.isfinite(array) & ~unknown):
            raise MpqError(
                f"sensitivity table: {name} of {table.weights[row].path} at {table.schemes[column]} is "
                f"{array[row, column]}: compute the table again, and look at this weight if it persists"
            )
