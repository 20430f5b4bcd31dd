r"""How far from the optimum plans with interactions can be: the gap at several sizes, by each of the two bounds.

Run:     mpq sensitivity MODEL --data DATA --metric gauss_newton --schemes ... -o s
         mpq interactions MODEL --data DATA --schemes ... -o pairs
         python -m experiments.bench_quadratic --table s --interactions pairs --out FILE
Expect:  seconds a size for 25 groups and 6 schemes; a gap of at most 5 % at all of them
Writes:  one JSON object: a row a size with the loss of the plan, the gap in percent of it by pairs alone (moved terms
         and branching) and with the semidefinite bound, and the seconds
"""

import dataclasses
import time
from pathlib import Path
from unittest import mock

import numpy as np
import tyro

from mpq import artifacts
from mpq.allocate import Problem, quadratic, solve_quadratic
from mpq.files import canonical_json, write_json
from mpq.record import RunRecord
from mpq.types import Allocation


@dataclasses.dataclass(frozen=True)
class Options:
    """What is solved.

    Attributes:
      table: what `mpq sensitivity` wrote.
      interactions: what `mpq interactions` wrote for the same candidates.
      out: JSON file.
      bpw: sizes, in bits per weight.
    """

    table: Path
    interactions: Path
    out: Path
    bpw: tuple[float, ...] = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


def percent(plan: Allocation) -> float:
    """The gap of a plan, relative to its loss."""
    return 100 * plan.gap / abs(plan.loss)


def main(options: Options) -> None:
    """Solve, print, write.

    Raises:
      MpqError: a file is missing or of other candidates, or a size is out of range.
    """
    table, _ = artifacts.load_table(options.table)
    pairs = artifacts.load_interactions(options.interactions)
    problem, matrix = Problem.from_table(table), pairs.matrix(table)
    weights, rows = sum(w.size for w in table.weights), []
    for bpw in options.bpw:
        budget = int(bpw * weights)
        begin = time.perf_counter()
        plan = solve_quadratic(problem, matrix, budget)
        seconds = time.perf_counter() - begin
        with mock.patch.object(quadratic, "NARROW", np.inf):  # never asks for the semidefinite bound
            alone = solve_quadratic(problem, matrix, budget)
        rows.append(
            {
                "bpw": bpw,
                "loss": plan.loss,
                "gap_percent": percent(plan),
                "gap_percent_by_pairs": percent(alone),
                "seconds": seconds,
            }
        )
        print(canonical_json(rows[-1]), end="", flush=True)
    config = {"table": options.table.name, "interactions": options.interactions.name, "bpw": options.bpw}
    record = RunRecord.collect(config, seeds={}, inputs={"model": table.model_digest, "data": table.data_digest})
    shape = {"groups": len(problem.names), "schemes": [str(scheme) for scheme in table.schemes]}
    head = {"shrinkage": pairs.shrinkage, "metric": table.metric, **shape}
    write_json(options.out, head | {"rows": rows, "record": record.to_json()})


if __name__ == "__main__":
    main(tyro.cli(Options))
