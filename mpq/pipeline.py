"""The stages in a row: `run(config)` and the run folder. The one place that decides what is computed and kept on disk.

A run folder is named by the digest of everything its content depends on (config, model, data, versions, the source of
this package), so a file found in it is a finished stage of this very run: an interrupted run continues, and gives the
same bytes. What takes long, scores and measured plans, lies by content beside the run folders (`mpq.store`), where the
run of another config finds what it has in common with this one.
"""

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import all_ranges, all_rows
from mpq.activations.ranges import ActivationRange
from mpq.allocate import Frontier, Problem, Refine, heuristic, solve_frontier
from mpq.artifacts import (
    Plan,
    load_plan,
    load_scores,
    load_stats,
    load_table,
    other_bits,
    plan_of_allocation,
    save_plan,
    save_scores,
    save_stats,
    save_table,
    uniform_plan,
)
from mpq.budget import budget_bits
from mpq.calibrate import calibrate
from mpq.config import RunConfig
from mpq.data import divide, take
from mpq.data.sources import read_sets
from mpq.distill import Mixture, checkpoint
from mpq.estimate import mean_over_documents
from mpq.evaluate import DocumentScores, Reference, score
from mpq.formats import parse_scheme
from mpq.guide import Guide
from mpq.inputs import Dataset
from mpq.measure import PlanLoss
from mpq.models import Model, load
from mpq.progress import track
from mpq.quantize import QUANTIZERS, Candidates, apply_plan
from mpq.record import timed
from mpq.sensitivity import METRICS
from mpq.sensitivity.base import require_finite_entries
from mpq.store import Store, score_store, source_digest
from mpq.trace import Trace
from mpq.types import Allocation, LayerStats, Params, QTensor, SensitivityTable, Status

T = TypeVar("T")
SETS = ("calibration", "selection", "test")


def datasets(model: Model, config: RunConfig) -> dict[str, Dataset]:
    """The calibration, selection and test sets of a run; no row is in two of them.

    Raises:
      MpqError: a source is missing, too short, does not suit the model, or its sets overlap.
    """
    return read_sets(
        model,
        config.data,
        window=config.window,
        limits={name: getattr(config, f"{name}_windows") for name in SETS},
        windows_per_document=config.windows_per_document,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run: its inputs and its folder. Every property is a stage, computed once and kept in the folder."""

    config: RunConfig
    model: Model
    sets: Mapping[str, Dataset]
    folder: Path
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall time by stage, of what this process computed."""

    @functools.cached_property
    def traced(self) -> Trace:
        """The traced model, on batches of the run's shape."""
        return self.model.trace(self.config.batch_size, self.config.window)

    @functools.cached_property
    def store(self) -> Store:
        """Scores by content, beside the run folders: runs share what they have in common."""
        return score_store(self.folder.parent / "scores", self.config.activations)

    @functools.cached_property
    def ranges(self) -> dict[str, ActivationRange]:
        """What the calibration set says of activations with static ranges, by path."""
        return all_ranges(self.config.activations, self.model, self.traced, self.sets["calibration"])

    @functools.cached_property
    def activations(self) -> tuple[RoundedActivation, ...]:
        """What is rounded beside the weights, in every plan alike."""
        data = self.sets["calibration"]
        return all_rows(self.config.activations, self.model, self.traced, data, self.ranges)

    @functools.cached_property
    def rounded(self) -> Model:
        """The model that plans are measured on: the original, with its activations rounded."""
        return with_activations(self.model, self.traced, self.activations)

    @functools.cached_property
    def stats(self) -> dict[str, LayerStats]:
        """Second moments of every weight's input."""
        return self._calibrated("stats.safetensors")

    @functools.cached_property
    def rounding_stats(self) -> dict[str, LayerStats]:
        """What rounding goes by: these, or with tokens weighted by the end loss."""
        return self._calibrated("guided.safetensors", self.guide) if self.config.guided else self.stats

    def _calibrated(self, name: str, guide: Guide | None = None) -> dict[str, LayerStats]:
        data, size = self.divided[1], self.config.batch_size
        weigh = lambda: None if guide is None else guide(self.model, self.traced, data, size)
        return self.stage(
            name,
            lambda path: load_stats(path, self.model.digest)[0],
            lambda: calibrate(self.traced, self.model.params, data, size, weigh()),
            lambda path, s: save_stats(path, s, self.model.digest, data),
        )

    @property
    def guide(self) -> Guide:
        """Weights tokens for rounding's statistics."""
        return Guide(seed=self.config.seed)

    @functools.cached_property
    def divided(self) -> tuple[Dataset, Dataset]:
        """The calibration set in two: what losses are measured on, and what rounding's statistics are made of."""
        return divide(self.sets["calibration"], self.config.scored_windows)

    @functools.cached_property
    def candidates(self) -> dict[str, Candidates]:
        """Quantized weights by rounding algorithm, made when asked for."""
        params, weights = self.model.params, self.traced.weights
        return {m: Candidates(params, weights, QUANTIZERS[m], self.rounding_stats) for m in self.methods}

    @property
    def methods(self) -> tuple[str, ...]:
        """Rounding algorithms, the one that is handed out first."""
        return tuple(dict.fromkeys((self.config.method, *self.config.compare_methods)))

    @functools.cached_property
    def tables(self) -> dict[str, SensitivityTable]:
        """Sensitivity tables of the method that is handed out, by metric."""
        return {metric: self._table(metric, self.config.method) for metric in self.config.metrics}

    @functools.cached_property
    def allocation_tables(self) -> dict[str, SensitivityTable]:
        """By rounding algorithm, the table that its plans are solved from, made of its own errors."""
        compared = {m: self._table(self.config.compare_by, m) for m in self.methods[1:]}
        return {self.config.method: self.tables[self.config.allocate_by], **compared}

    @functools.cached_property
    def frontiers(self) -> dict[str, Frontier]:
        """Every non-dominated plan, by rounding algorithm."""
        return {m: solve_frontier(Problem.from_table(table)) for m, table in self.allocation_tables.items()}

    @functools.cached_property
    def uniform(self) -> dict[str, Plan]:
        """Uniform plans by scheme."""
        weights = self.traced.weights
        fitting = [s for s in self.config.schemes if all(parse_scheme(s).fits(w.k) for w in weights)]
        return {s: uniform_plan(parse_scheme(s), self.model, weights) for s in fitting}

    @functools.cached_property
    def heuristics(self) -> dict[str, Plan]:
        """llama.cpp's fixed mix of the largest base scheme that fits, of the main method, by budget; left out: none."""
        table, problem = self.allocation_tables[self.config.method], self.frontiers[self.config.method].problem
        beside = other_bits(self.model, self.traced.weights)
        found = {b: heuristic(problem, self.bits(b)) for b in self.config.budgets}
        return {b: plan_of_allocation(a.solver, a, table, beside) for b, a in found.items() if a is not None}

    @functools.cached_property
    def separable(self) -> dict[str, dict[str, Plan]]:
        """The solution of the knapsack, by rounding algorithm and budget."""
        return {m: {budget: self._solve(budget, m) for budget in self.config.budgets} for m in self.methods}

    @functools.cached_property
    def mixed(self) -> dict[str, dict[str, Plan]]:
        """The plans that are reported: solutions of the knapsack, those of the main method searched on if asked for."""
        main = self.config.method
        if not self.config.searches:
            return self.separable
        budgets = track(self.config.budgets, "refine", len(self.config.budgets))
        return self.separable | {main: {budget: self._searched(budget) for budget in budgets}}

    def bits(self, budget: str) -> int:
        """Bits that the quantized weights may take, see `budget_bits`."""
        return budget_bits(budget, self.model, self.traced, self.uniform)

    def scores(self, plan: Plan, method: str, which: str) -> DocumentScores:
        """A plan's quality on the selection or test set."""
        return self.measured(f"{method}-{plan.name}", lambda: self.params(self.qtensors(plan, method)), which)

    def reference_scores(self, which: str) -> DocumentScores:
        """The unquantized model's own quality: KL 0, agreement 1."""
        make = lambda: score(
            self.model, self.model.params, self.sets[which], reference=self.reference(which), batch_size=0
        )
        return self._scores_stage(f"{which}-original", make)

    def qtensors(self, plan: Plan, method: str) -> dict[str, QTensor]:
        """Path -> quantized weight."""
        return self.candidates[method].choose(plan.choices)

    def params(self, qtensors: Mapping[str, QTensor], beside: Params | None = None) -> dict[str, jax.Array]:
        """The model's parameters with these weights, and with other values of what is beside them."""
        return apply_plan({**self.model.params, **(beside or {})}, self.traced.weights, qtensors)

    def measured(self, name: str, made: Callable[[], Params], which: str) -> DocumentScores:
        """Quality of parameters on the selection or test set; that of the original if they are it, bit for bit.

        Args:
          name: of the scores, by which they are kept.
          made: makes the parameters, if they are not measured yet.
          which: `selection` or `test`.
        """

        def make() -> DocumentScores:
            params = made()
            same = all(bool(jnp.array_equal(params[path], original)) for path, original in self.model.params.items())
            if same and not self.activations:
                return self.reference_scores(which)
            return score(self.rounded, params, self.sets[which], reference=self.reference(which), batch_size=0)

        return self._scores_stage(f"{which}-{name}", make)

    def _scores_stage(self, name: str, make: Callable[[], DocumentScores]) -> DocumentScores:
        load_it = lambda path: load_scores(path, self.model.task)
        return self.stage(f"scores/{name}.json", load_it, make, save_scores)

    def _solve(self, budget: str, method: str) -> Plan:
        def make() -> Plan:
            allocation = self.frontiers[method].at(bits=self.bits(budget))
            beside = other_bits(self.model, self.traced.weights)
            return plan_of_allocation(f"mixed@{budget}", allocation, self.allocation_tables[method], beside)

        load_it = lambda path: load_plan(path, self.model, self.traced.weights)
        return self.stage(f"plans/{method}-mixed@{budget}.json", load_it, make, save_plan)

    def _searched(self, budget: str) -> Plan:
        """What the searches on measured plans that are asked for make of the exact solution."""
        method, config = self.config.method, self.config
        table, problem = self.allocation_tables[method], self.frontiers[method].problem

        def make() -> Plan:
            found = self.frontiers[method].at(bits=self.bits(budget))
            if config.gradient_steps:
                found = self._by_gradient(problem, found)
            if config.refine_rounds:
                found = Refine(config.refine_rounds)(problem, found, self._plan_loss).allocation
            mean, stderr = mean_over_documents(self._plan_loss.documents(found.choice), self._plan_loss.counts)
            measured = dataclasses.replace(found, loss=float(mean), stderr=float(stderr))
            return plan_of_allocation(f"mixed@{budget}", measured, table, other_bits(self.model, self.traced.weights))

        load_it = lambda path: load_plan(path, self.model, self.traced.weights)
        return self.stage(f"plans/{method}-mixed@{budget}-refined.json", load_it, make, save_plan)

    def _by_gradient(self, problem: Problem, start: Allocation) -> Allocation:
        """The plan of the search by gradient, or `start` where that measures no worse. `loss` is the measured one."""
        config, loss = self.config, self._plan_loss
        data, state = take(self.divided[0], config.refine_windows), self.folder / "search.state"
        search = Mixture(steps=config.gradient_steps, batch_size=min(config.batch_size, len(data.inputs)))
        key, candidates = jax.random.key(config.seed), self.candidates[config.method]
        bits = start.budget_bits
        searched = search(self.model, problem, candidates, data, bits, key=key, measure=loss, state=state)
        plans = [problem.by_group(start.choice), searched.choice]
        best = min(plans, key=lambda x: loss(problem.by_path(x)))
        found = problem.allocation(best, budget_bits=bits, lower_bound=0, solver=search.name)
        checkpoint.remove(state)
        measured = loss(found.choice)  # and the bound is the table's
        return dataclasses.replace(found, loss=measured, lower_bound=start.lower_bound, status=Status.FEASIBLE)

    @functools.cached_property
    def _plan_loss(self) -> PlanLoss:
        """Measured KL of the main method's plans on calibration data."""
        data = take(self.divided[0], self.config.refine_windows)
        reference = Reference(self.model, data, min(self.config.batch_size, len(data.inputs)))
        return PlanLoss(self.rounded, self.traced, self.candidates[self.config.method], reference, self.store)

    def sensitivity_data(self, metric: str) -> Dataset:
        """The part of the calibration set that a metric is measured on."""
        return take(self.divided[0], self.config.windows_of(metric))

    def _table(self, metric: str, method: str) -> SensitivityTable:
        data = self.sensitivity_data(metric)
        name = f"sensitivity-{metric}-{method}"

        def make() -> SensitivityTable:
            table = METRICS[metric](
                self.model,
                self.traced,
                tuple(parse_scheme(s) for s in self.config.schemes),
                self.candidates[method],
                data,
                key=jax.random.key(self.config.seed),
                batch_size=min(self.config.batch_size, len(data.inputs)),
                store=self.store,
            )
            require_finite_entries(table.loss_increase, table.weights, table.schemes)
            return table

        extra = {"other_bits": other_bits(self.model, self.traced.weights)}
        save = lambda path, table: save_table(path, table, extra)
        return self.stage(f"{name}.json", lambda path: load_table(path)[0], make, save)

    @functools.cache  # noqa: B019  # a run lives as long as the process; the references are meant to be kept
    def reference(self, which: str) -> Reference:
        """The unquantized model's outputs on the selection or test set, computed once."""
        return Reference(self.model, self.sets[which], self.config.batch_size)

    def stage(
        self, name: str, load_it: Callable[[Path], T], make: Callable[[], T], save: Callable[[Path, T], None]
    ) -> T:
        """The value of a stage: read from its file, or made and written there."""
        path = self.folder / name
        if path.exists():
            return load_it(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with timed(self.seconds, name.split("/")[0].split(".")[0]):
            value = make()
            save(path, value)
        return value


def prepare(config: RunConfig, root: Path) -> Run:
    """Load model and texts, and name the run folder.

    Raises:
      MpqError: whatever is wrong with the config, the model or the text.
    """
    config.check()
    model = load(config.model)
    sets = datasets(model, config)
    inputs = {
        "config": dataclasses.asdict(config),
        "model": model.digest,
        "data": {name: data.digest for name, data in sets.items()},
        "versions": [platform.python_version(), jax.__version__, np.__version__, source_digest()],
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{config.name}-{digest}"
    run = Run(config, model, sets, folder)
    for budget in config.budgets:
        run.bits(budget)
    folder.mkdir(parents=True, exist_ok=True)
    return run
