r"""Bit widths by gradient against the exact solver: the same candidates, groups and budgets, judged on held-out text.

Run:     python -m experiments.bit_search --model DIR --data TEXT --test TEXT --out FILE
Expect:  where errors add up, the exact solver on measured losses is as good at less cost; where they do not, at the
         lowest budgets, a search that sees whole plans can be better
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by budget and method, KL to the original on the test text in nats per token, with standard
         errors over windows, its difference to that of the search by gradient, and seconds

Candidates are rounded by GPTQ. Tables take `--table-windows` of the calibration text, the search all of it, in batches.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.distillation import windows_of
from experiments.kept import keep, rows_in
from mpq.allocate import Problem, solve_frontier
from mpq.calibrate import calibrate
from mpq.data import take
from mpq.distill import Mixture
from mpq.evaluate import DocumentScores, Reference, score
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.quantize import GPTQ, Candidates, apply_plan
from mpq.record import RunRecord
from mpq.sensitivity import METRICS

GRADIENT = "gradient"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data, test: calibration and held-out text.
      out: JSON file.
      budgets: bits per weight.
      schemes: candidates.
      metrics: of the tables that the exact solver takes.
      steps: of the search.
      windows: of either text, `window` tokens each, `batch_size` a pass.
      table_windows: of the calibration text, for tables.
    """

    model: str
    data: Path
    test: Path
    out: Path
    budgets: tuple[float, ...] = (2.75, 3.25, 4.0)
    schemes: tuple[str, ...] = ("int2_g32", "int3_g32", "int4_g32", "int5_g32", "int6_g32")
    metrics: tuple[str, ...] = ("fisher", "kl")
    steps: int = 300
    windows: int = 64
    window: int = 256
    batch_size: int = 8
    table_windows: int = 16


class Comparison:
    """The model, its text and its candidates."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        self.traced = self.model.trace(options.batch_size, options.window)
        read = lambda path: windows_of(self.model, path, options.windows, options.window)
        self.calibration, test = read(options.data), read(options.test)
        self.reference = Reference(self.model, test, options.batch_size)
        stats = calibrate(self.traced, self.model.params, self.calibration, options.batch_size)
        self.candidates = Candidates(self.model.params, self.traced.weights, GPTQ(), stats)

    @functools.cache  # noqa: B019 one comparison a process
    def problem(self, metric: str) -> tuple[Problem, float]:
        """Groups, schemes, sizes and predicted losses, and the seconds that these took."""
        start = time.perf_counter()
        table = METRICS[metric](
            self.model,
            self.traced,
            tuple(map(parse_scheme, self.options.schemes)),
            self.candidates,
            take(self.calibration, self.options.table_windows),
            key=jax.random.key(0),
            batch_size=self.options.batch_size,
        )
        return Problem.from_table(table), time.perf_counter() - start

    def choice(self, method: str, budget: int) -> tuple[np.ndarray, float]:
        """A scheme for every group by a method, and the seconds that it took."""
        if method != GRADIENT:
            problem, seconds = self.problem(method)
            return solve_frontier(problem).choice_within(budget), seconds
        problem, _ = self.problem(self.options.metrics[0])  # of which the search reads groups and sizes
        start = time.perf_counter()
        search = Mixture(steps=self.options.steps, batch_size=self.options.batch_size)
        found = search(self.model, problem, self.candidates, self.calibration, budget, key=jax.random.key(0))
        return found.choice, time.perf_counter() - start

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a budget and method, budgets all of whose rows are in `done` left out."""
        for bpw in self.options.budgets:
            if any(row["budget"] == bpw for row in done):
                continue
            rows, scores = [], {}
            for method in (*self.options.metrics, GRADIENT):
                problem, _ = self.problem(self.options.metrics[0])
                choice, seconds = self.choice(method, int(bpw * problem.num_weights))
                plan = problem.by_path(choice)
                scores[method] = self.scores(plan)
                names = [str(scheme) for scheme in plan.values()]
                bits = problem.evaluate(choice)[0] / problem.num_weights
                told = {"budget": bpw, "method": method, "seconds": round(seconds, 1), "bits_per_weight": bits}
                rows.append(told | {"schemes": {name: names.count(name) for name in sorted(set(names))}})
            for row in rows:
                result = scores[row["method"]].summary()
                less, stderr = scores[row["method"]].difference(scores[GRADIENT], "kl")
                more = {"above_gradient": less, "above_gradient_stderr": stderr}
                yield row | {"kl": result.kl, "kl_stderr": result.kl_stderr, "perplexity": result.quality} | more

    def scores(self, plan: Any) -> DocumentScores:
        """On the held-out text."""
        params = apply_plan(self.model.params, self.traced.weights, self.candidates.choose(plan))
        return score(self.model, params, self.reference.data, reference=self.reference, batch_size=0)


def main(options: Options) -> None:
    """Compare, print, write after every row."""
    done = rows_in(options.out)
    comparison = Comparison(options)
    named = {key: getattr(options, key).name for key in ("data", "test", "out")}
    config = dataclasses.asdict(options) | named | {"model": comparison.model.name}
    inputs = {"model": comparison.model.digest, "calibration": comparison.calibration.digest}
    inputs |= {"test": comparison.reference.data.digest}
    record = RunRecord.collect(config, seeds={"search": 0, "tables": 0}, inputs=inputs)
    settings = dataclasses.asdict(Mixture(steps=options.steps, batch_size=options.batch_size))
    keep(comparison.rows(done), options.out, {"search": settings, "record": record.to_json()}, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
