"""Bit allocation: which scheme every weight gets within a size.

    problem = Problem.from_table(table, pins={"lm_head.*": "int8_channel"})
    # only={"layers.0.*": ["int4_g64", "int8_channel"]} leaves a choice where a pin leaves none
    frontier = solve_frontier(problem)       # every non-dominated allocation, exactly, once
    allocation = frontier.at(bpw=3.5)        # or size="4MB", bits=..., loss=0.01

    # limits beside the size, by mixed-integer programming
    allocation = solve_constrained(problem, budget_bits, [bops(problem, 1e12), latency(problem, times, 500.0)])
    # losses that do not add up: a term for every pair of weights
    allocation = solve_quadratic(problem, interactions.matrix(table), budget_bits)
    # llama.cpp's fixed mix, the baseline that needs no table
    allocation = heuristic(problem, budget_bits)
    # the loss of any plan from some that were measured, searched in place of measuring
    found = Refine()(problem, allocation, Surrogate(problem, plans, measured).measure)
    # how often every scheme is chosen, were the sensitivities measured again
    found = stability(problem, budget_bits, np.random.default_rng(0))

`SOLVERS` is the table of solvers for a single budget: frozen objects with `solve(problem, budget_bits) -> Allocation`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from mpq.allocate.constrained import solve_constrained
from mpq.allocate.constraints import Constraint, bops, latency, peak_memory
from mpq.allocate.frontier import Exact, Frontier, solve_frontier
from mpq.allocate.heuristic import heuristic
from mpq.allocate.lagrangian import Lagrangian, lower_bound
from mpq.allocate.power_law import PowerLaw
from mpq.allocate.problem import Problem
from mpq.allocate.quadratic import solve_quadratic
from mpq.allocate.refine import Refine, Refined
from mpq.allocate.refit import Refit, refit
from mpq.allocate.rules import matching
from mpq.allocate.stability import Stability, gaussian, resampled, stability
from mpq.allocate.surrogate import Surrogate
from mpq.allocate.uniform import Uniform, best_uniform, uniform
from mpq.types import Allocation

__all__ = [
    "SOLVERS",
    "Constraint",
    "Exact",
    "Frontier",
    "Lagrangian",
    "PowerLaw",
    "Problem",
    "Refine",
    "Refined",
    "Refit",
    "Solver",
    "Stability",
    "Surrogate",
    "Uniform",
    "best_uniform",
    "bops",
    "gaussian",
    "heuristic",
    "latency",
    "lower_bound",
    "matching",
    "peak_memory",
    "refit",
    "resampled",
    "solve_constrained",
    "solve_frontier",
    "solve_quadratic",
    "stability",
    "uniform",
]


class Solver(Protocol):
    """Chooses schemes within one budget."""

    @property
    def name(self) -> str: ...
    def solve(self, problem: Problem, budget_bits: int) -> Allocation: ...


SOLVERS: Mapping[str, Solver] = MappingProxyType({"exact": Exact(), "lagrangian": Lagrangian(), "uniform": Uniform()})
