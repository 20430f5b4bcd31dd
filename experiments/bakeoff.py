r"""Which sensitivity metric predicts the loss of whole plans? All of them on one model, against measured random plans.

Run:     python -m experiments.bakeoff --model DIR --data FILE [--test FILE] --out experiments/results/bakeoff/NAME.json
Expect:  the files of that folder, which `python -m analysis.bakeoff` joins to one table
Resume:  type the same command again; what is measured is kept in `--work`.

In each band of bits (2-4, 3-5, 4-8) every fused group of a plan draws its scheme uniformly. `--plans` plans a band are
measured on the test set, which no metric sees. A metric predicts a plan by the sum over its weights:

    tau        Kendall's tau of predicted and measured KL
    r2         of the logarithms, about the best line of slope one
    ratio      geometric mean of predicted / measured
    spread     standard deviation of the logarithm of predicted / measured

`calibrated` is the same for a power law fitted to `--fit-plans` further plans, measured on the set that `--fit-set`
names, and `refitted` for the table corrected by these plans (`mpq.allocate.refit`). `cost` counts forward passes over
the calibration set: seconds without rounding and compilation over those of a forward pass, in the same process;
processor seconds on a CPU. What no predictor can pass is told by two more numbers: `ceiling`, the agreement of the
further plans' own KL on the calibration and the test set, and `halves`, tau between the KL of the plans on two halves
of the test set.

Two predictors are no metric: `kl+interactions` adds to `kl` the pairs of `mpq.sensitivity.interactions`, and `marginal`
is measured one group at a time around the plan that has the middle scheme of the band everywhere.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from scipy.stats import kendalltau

from mpq.allocate import PowerLaw, Problem, refit
from mpq.artifacts import load_table, save_table
from mpq.calibrate import calibrate
from mpq.data import divide, require_disjoint, take
from mpq.data.sources import read_set, read_sets
from mpq.equalize import find_shifts
from mpq.evaluate import Reference
from mpq.files import digest_json, read_json, write_json
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.measure import PlanLoss
from mpq.models import Model, load
from mpq.progress import shown, track
from mpq.quantize import GPTQ, RTN, Candidates
from mpq.quantize.one_pass import OnePass
from mpq.sensitivity import METRICS
from mpq.sensitivity.interactions import Interactions, InteractionTable
from mpq.store import score_store
from mpq.types import MpqError, Scheme, SensitivityTable

BANDS = ((2, 4), (3, 5), (4, 8))
METHODS = {"rtn": RTN(), "rtn_mse": RTN(scale="mse"), "gptq": GPTQ()}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: folder, or `reference`.
      data: source of the calibration set, and of the test set unless `test` says otherwise.
      out: JSON file.
      work: folder of what is measured.
      test: source of the test set.
      method: rounding algorithm.
      granularity: of the schemes int2 to int8: `g32`, `channel`.
      metrics: names, kl among them; a name with `:N` sees the first N rows only.
      window: tokens a row.
      calibration_rows: that metrics see.
      statistics_rows: further ones of the same source, that rounding sees.
      test_rows: of the test set.
      batch_size: rows a pass.
      plans: measured on the test set, a band.
      fit_plans: further ones, measured on the calibration and the test set.
      fit_set: what a correction goes by: their KL on the calibration set, or on as many rows of the selection set as
        are in the test set (only without `test`), which metrics do not see either.
      corrected: measure plans with biases and norms corrected for what rounding does (`mpq.quantize.one_pass`), on the
        rows that rounding sees.
      seed: of plans and keys.
    """

    model: str
    data: str
    out: Path
    work: Path = Path("runs/bakeoff")
    test: str | None = None
    method: str = "rtn"
    granularity: str = "g64"
    metrics: tuple[str, ...] = tuple(METRICS)
    window: int | None = None
    calibration_rows: int = 32
    statistics_rows: int = 64
    test_rows: int = 64
    batch_size: int = 8
    plans: int = 200
    fit_plans: int = 40
    fit_set: Literal["calibration", "selection"] = "calibration"
    corrected: bool = False
    seed: int = 0


class Bakeoff:
    """One model under one rounding algorithm."""

    def __init__(self, options: Options) -> None:
        """Load, trace, calibrate.

        Raises:
          MpqError: `metrics` lacks kl, the model has nothing to correct, or it or the data is wrong.
        """
        if "kl" not in {metric.partition(":")[0] for metric in options.metrics}:
            raise MpqError("metrics lack kl, which two predictors are made of: add it")
        self.options, self.model = options, load(options.model)
        sets = _sets(self.model, options)
        self.calibration, statistics = divide(sets["calibration"], options.calibration_rows)
        self.sets = sets | {"calibration": self.calibration}
        self.traced = self.model.trace(options.batch_size, options.window)
        self.schemes = tuple(parse_scheme(f"int{bits}_{options.granularity}") for bits in (2, 3, 4, 5, 6, 8))
        stats = calibrate(self.traced, self.model.params, statistics, options.batch_size)
        self.candidates = Candidates(self.model.params, self.traced.weights, METHODS[options.method], stats)
        self.statistics_rows = len(statistics.inputs)
        self.correct = self._correction(statistics) if options.corrected else None
        shown_options = dataclasses.asdict(options) | {"out": "", "work": "", "metrics": "", "plans": 0, "fit_plans": 0}
        del shown_options["fit_set"]
        inputs = [shown_options, self.model.digest, sets["calibration"].digest, sets["test"].digest]
        self.digest = digest_json(inputs)[:12]
        self.folder = options.work / f"{options.out.stem}-{self.digest}"
        self.store = score_store(self.folder / "scores")

    def description(self) -> dict[str, Any]:
        """Of a result file: what was measured, on what."""
        options = self.options
        rows = {name: int(rows) for name, _, rows in (m.partition(":") for m in options.metrics) if rows}
        return {
            "model": self.model.name,
            # Names alone: where files lie is this machine's business.
            "data": [one.source.rsplit("/", 1)[-1] for one in (self.calibration, self.sets["test"])],
            "rows": [len(self.calibration.inputs), len(self.sets["test"].inputs)],
            "statistics_rows": self.statistics_rows,
            "method": options.method,
            "schemes": [str(s) for s in self.schemes],
            "groups": len({weight.group for weight in self.traced.weights}),
            "plans": options.plans,
            "fit_plans": options.fit_plans,
            "fit_set": options.fit_set,
            "corrected": options.corrected,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "metric_rows": rows,
        }

    def table(self, metric: str) -> tuple[SensitivityTable, float]:
        """The metric's table and its cost in forward passes over the whole calibration set."""
        path = self.folder / f"{metric.replace(':', '-')}.json"
        name, _, rows = metric.partition(":")
        data = take(self.calibration, int(rows)) if rows else self.calibration
        if not path.exists():
            arguments = self.model, self.traced, self.schemes, self.candidates, data
            keywords = {"key": jax.random.key(self.options.seed), "batch_size": self.options.batch_size}
            self._round_all()
            seconds, table = _running(lambda: METRICS[name](*arguments, **keywords))
            save_table(path, table, {"cost": seconds / self.forward_seconds()})
        table, body = load_table(path)
        return table, body["cost"]

    def interactions(self) -> tuple[InteractionTable, float]:
        """The pairs of all candidates and their cost in forward passes over the calibration set."""
        path = self.folder / "interactions.json"
        arguments = self.model, self.traced, self.schemes, self.candidates, self.calibration
        keywords = {"key": jax.random.key(self.options.seed), "batch_size": self.options.batch_size}
        if not path.exists():
            self._round_all()
            seconds, _ = _running(lambda: Interactions()(*arguments, **keywords))
            write_json(path, {"cost": seconds / self.forward_seconds()})
        pairs = Interactions()(*arguments, **keywords, store=self.store)
        return pairs, read_json(path, "cost of interactions")["cost"]

    def _correction(self, statistics: Dataset) -> OnePass:
        shifts = find_shifts(self.model, self.traced, statistics)
        if not shifts:
            raise MpqError(f"{self.model.name} has no bias and no norm behind a weight: leave out --corrected")
        return OnePass(self.model, self.traced, shifts, statistics, norms=True)

    def plan_cost(self, which: str) -> float:
        """Of measuring one plan on one of the sets, in forward passes over the calibration set."""
        beside = 0 if self.correct is None else self.statistics_rows
        return (len(self.sets[which].inputs) + beside) / len(self.calibration.inputs)

    def alone(self, band: tuple[int, int], problem: Problem) -> tuple[Problem, float]:
        """Losses of one group's scheme of the band, all others exact, measured as plans are, and their cost."""
        exact = dict.fromkeys((weight.path for weight in self.traced.weights), parse_scheme("fp32"))
        changes = [(group, scheme) for group in range(len(problem.names)) for scheme in self.allowed(band)]
        choices = [exact | {spec.path: self.schemes[s] for spec in problem.members[g]} for g, s in changes]
        loss = np.zeros(problem.loss.shape)
        loss[tuple(np.transpose(changes))] = self.measure("calibration", choices, "alone")[0]
        return dataclasses.replace(problem, loss=loss), len(choices) * self.plan_cost("calibration")

    def marginal(self, band: tuple[int, int], problem: Problem) -> tuple[Problem, float]:
        """Losses around the plan of the band's middle scheme, that plan's loss shared by all groups, and their cost."""
        allowed = self.allowed(band)
        middle = np.full(len(problem.names), allowed[len(allowed) // 2])
        changes = [(group, scheme) for group in range(len(middle)) for scheme in allowed if scheme != middle[group]]
        plans = np.tile(middle, (1 + len(changes), 1))
        plans[np.arange(1, len(plans)), [g for g, _ in changes]] = [s for _, s in changes]
        base, *others = self.measure("calibration", [problem.by_path(x) for x in plans], "marginal")[0]
        loss = np.full(problem.loss.shape, base / len(middle))
        loss[tuple(np.transpose(changes))] += np.array(others) - base
        return dataclasses.replace(problem, loss=loss), len(plans) * self.plan_cost("calibration")

    def _round_all(self) -> None:
        """Make all candidates, so that no metric is charged with it."""
        for spec, scheme in itertools.product(self.traced.weights, self.schemes):
            jax.block_until_ready(self.candidates.dequantized(spec, scheme))

    def forward_seconds(self) -> float:
        """Of one forward pass over the calibration set, the median of three."""
        forward = jax.jit(self.model.apply)
        run = lambda: jax.block_until_ready(
            [forward(self.model.params, b.inputs) for b in self.calibration.batches(self.options.batch_size)]
        )
        run()
        return float(np.median([_running(run)[0] for _ in range(3)]))

    def allowed(self, band: tuple[int, int]) -> list[int]:
        """The band's schemes."""
        return [i for i, scheme in enumerate(self.schemes) if band[0] <= scheme.format.bits <= band[1]]

    def plans(self, band: tuple[int, int], groups: int) -> np.ndarray:
        """`int64[plans + fit_plans, groups]`: index of each group's scheme."""
        rng = np.random.default_rng([self.options.seed, *band])
        return rng.choice(self.allowed(band), (self.options.plans + self.options.fit_plans, groups))

    def measure(self, which: str, choices: Sequence[Mapping[str, Scheme]], what: str) -> tuple[np.ndarray, float]:
        """Measured KL on one of the sets, `float64[plans]`, and tau of it between halves of the set."""
        sums, counts = self.documents(which, choices, what)
        odd, even = (sums[:, start::2].sum(axis=1) for start in (0, 1))
        return sums.sum(axis=1) / counts.sum(), _tau(odd, even)

    def documents(
        self, which: str, choices: Sequence[Mapping[str, Scheme]], what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the measured KL over each document of one of the sets, `float64[plans, D]`, and what counts in it."""
        data = self.sets[which]
        reference = Reference(self.model, data, min(self.options.batch_size, len(data.inputs)))
        loss = PlanLoss(self.model, self.traced, self.candidates, reference, self.store, self.correct)
        sums = [loss.documents(choice) for choice in track(choices, f"{what} on {which}", len(choices))]
        return np.array(sums), loss.counts


def main(options: Options) -> None:
    """Score, measure, compare, write."""
    run = Bakeoff(options)
    scored = {metric.partition(":")[0]: run.table(metric) for metric in track(options.metrics, "metrics")}
    cost = {name: cost for name, (_, cost) in scored.items()}
    pairs, cost["kl+interactions"] = run.interactions()
    cost["kl+interactions"] += cost["kl"]
    problems = {name: Problem.from_table(table) for name, (table, _) in scored.items()}
    any_problem = problems["kl"]
    bands = []
    for band in BANDS:
        what = f"{band[0]}-{band[1]} bits"
        plans = run.plans(band, len(any_problem.names))
        choices = [any_problem.by_path(x) for x in plans]
        measured, halves = run.measure("test", choices, what)
        own, _ = run.measure("calibration", further := choices[options.plans :], what)
        fit = own if options.fit_set == "calibration" else run.measure(options.fit_set, further, what)[0]
        around, cost["marginal"] = run.marginal(band, any_problem)
        judged = {name: judge(p, plans, fit, measured) for name, p in {**problems, "marginal": around}.items()}
        together = np.array([pairs.predict(scored["kl"][0], choice) for choice in choices])
        judged["kl+interactions"] = compare(together, fit, measured, options.plans)
        bands.append(
            {
                "bits": list(band),
                "median": rounded(float(np.median(measured[: options.plans]))),
                "ceiling": agreement(own, measured[options.plans :]),
                "halves": rounded(halves),
                "metrics": judged,
            }
        )
    write_json(
        options.out,
        run.description()
        | {
            "cost": {name: rounded(cost) for name, cost in cost.items()},
            "bands": bands,
        },
    )


def judge(problem: Problem, plans: np.ndarray, fit: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """What `compare` says of a table's sums, and the agreement of the table corrected by the further plans."""
    count = len(plans) - len(fit)
    judged = compare(problem.parts(plans).sum(axis=1), fit, measured, count)
    if "calibrated" in judged:
        corrected = refit(problem, plans[count:], fit).predict(plans[:count])
        judged["refitted"] = agreement(corrected, measured[:count])
    return judged


def compare(total: np.ndarray, fit: np.ndarray, measured: np.ndarray, plans: int) -> dict[str, Any]:
    """A metric's agreement with the measured plans, as it is and by a power law from the further plans.

    Args:
      total: `[plans + fit_plans]`, sums of the metric.
      fit: `[fit_plans]`, measured on what corrections go by.
      measured: `[plans + fit_plans]`, measured on the test set.
      plans: how many are judged by.
    """
    judged: dict[str, Any] = agreement(total[:plans], measured[:plans])
    if (total <= 0).any():
        return judged
    law = PowerLaw.fit(total[plans:], fit)
    return judged | {"calibrated": agreement(law(total[:plans]), measured[:plans]), "exponent": rounded(law.exponent)}


def agreement(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """tau, r2, ratio and spread as the module's docstring says; tau alone where a sum is not positive."""
    values = {"tau": _tau(predicted, measured)}
    if (predicted > 0).all():
        log = np.log(predicted / measured)
        values |= {"r2": 1 - log.var() / np.log(measured).var(), "ratio": np.exp(log.mean()), "spread": log.std()}
    return {name: rounded(float(value)) for name, value in values.items()}


def _sets(model: Model, options: Options) -> dict[str, Dataset]:
    rows = options.calibration_rows + options.statistics_rows
    selected = options.test_rows if options.fit_set == "selection" else 2
    limits = {"calibration": rows, "selection": selected, "test": options.test_rows}
    if options.test is None:
        return read_sets(model, options.data, window=options.window, limits=limits, windows_per_document=None)
    if options.fit_set == "selection":
        raise MpqError("plans are to be measured on the selection set, but --test leaves none: give --data alone")
    sources = {"calibration": options.data, "test": options.test}
    sets = {
        which: read_set(model, source, which, window=options.window, limit=limits[which])
        for which, source in sources.items()
    }
    require_disjoint(**sets)
    return sets


def _running(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call without those of compilation, and its value.

    Processor time on a CPU, since other work on the machine does not change it; it cannot be told which part of it
    compiles, so a call that compiles for a notable part of its time is made again. On an accelerator the time that
    passes.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began, start = time.perf_counter(), clock()
    value = jax.block_until_ready(function())
    seconds, passed = clock() - start, time.perf_counter() - began
    jax.monitoring.unregister_event_duration_listener(listen)
    if sum(compiling) > 0.05 * passed:
        start = clock()
        value = jax.block_until_ready(function())
        seconds = clock() - start
    return seconds, value


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.asarray(kendalltau(a, b))[0])


def rounded(value: float) -> float:
    """To four digits, as results are written."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    with shown():
        main(tyro.cli(Options))
