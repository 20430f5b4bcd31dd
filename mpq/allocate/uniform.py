"""The baseline: one scheme for every weight."""

import dataclasses

import numpy as np

from mpq.allocate.lagrangian import lower_bound
from mpq.allocate.problem import Problem
from mpq.types import Allocation, MpqError, Scheme


def uniform(problem: Problem, scheme: Scheme | str, budget_bits: int | None = None) -> Allocation:
    """Every weight at `scheme`.

    Args:
      problem: the candidates and their sizes.
      scheme: one of the problem's schemes, or its text form.
      budget_bits: the limit to record; by default just its size.

    Raises:
      MpqError: the problem has no such scheme, it is not allowed everywhere, or it does not fit.
    """
    texts = [str(candidate) for candidate in problem.schemes]
    if str(scheme) not in texts:
        raise MpqError(f"scheme {str(scheme)!r} is not among the candidates: {', '.join(texts)}")
    column = texts.index(str(scheme))
    for row in np.flatnonzero(~problem.allowed[:, column]):
        raise MpqError(f"uniform {scheme} is not allowed: {problem.names[row]} must take another scheme")
    size_bits = int(problem.size_bits[:, column].sum())
    budget_bits = size_bits if budget_bits is None else problem.check_budget(budget_bits)
    if size_bits > budget_bits:
        raise MpqError(
            f"uniform {scheme} needs {problem.format_size(size_bits)}, "
            f"which does not fit {problem.format_size(budget_bits)}"
        )
    choice = np.full(len(problem.names), column)
    return problem.allocation(
        choice, budget_bits=budget_bits, lower_bound=lower_bound(problem, budget_bits), solver=f"uniform {scheme}"
    )


def best_uniform(problem: Problem, budget_bits: int) -> Allocation:
    """The allowed uniform scheme with the least predicted loss that fits; of equals the smallest.

    Raises:
      MpqError: the budget is out of range (`Problem.check_budget`), no scheme is allowed everywhere, or none fits.
    """
    budget_bits = problem.check_budget(budget_bits)
    everywhere = np.flatnonzero(problem.allowed.all(axis=0))
    if not len(everywhere):
        raise MpqError(
            "no scheme is allowed for every weight, so there is no uniform allocation: "
            "drop the pins to compare with one"
        )
    size_bits, loss = problem.size_bits.sum(axis=0), problem.fixed_point[0].sum(axis=0)
    fitting = [column for column in everywhere if size_bits[column] <= budget_bits]
    if not fitting:
        smallest = min(everywhere, key=lambda column: size_bits[column])
        raise MpqError(
            f"no uniform scheme fits {problem.format_size(budget_bits)}: the smallest is "
            f"{problem.schemes[smallest]} with {problem.format_size(int(size_bits[smallest]))}"
        )
    best = min(fitting, key=lambda column: (loss[column], size_bits[column]))
    return uniform(problem, problem.schemes[best], budget_bits)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The best uniform scheme that fits, as a solver."""

    name: str = dataclasses.field(default="uniform", init=False)

    def solve(self, problem: Problem, budget_bits: int) -> Allocation:
        """See `best_uniform`."""
        return best_uniform(problem, budget_bits)
