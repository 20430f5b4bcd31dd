"""`results.json`, which a run writes and every figure reads: its schema, and a loader that checks it.

The dataclasses below are the schema, one field for one key; `mpq.results` writes it. Quality and agreement are under
the names that the task gives them, such as `perplexity` or `accuracy`. Losses and KL are in nats per token (image,
example: the task's unit) with standard errors over documents, sizes in bytes of the whole model, `bits_per_weight`
counts every stored bit of the quantized weights over their number. A number that does not exist (the standard error of
one document, the quality without labels) is null. Keys beyond these are allowed and not read, so that a file may gain
some without a new schema number.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from analysis.range_info import RangeInfo
from analysis.reading import read
from mpq.files import read_json
from mpq.types import MpqError

SCHEMA = 1
_BY_TASK = MappingProxyType({"by_task": True})  # the key of this field is a name of the task, see `TaskInfo.keys`


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What the model is for, and the names of the numbers that only this task has.

    Attributes:
      name: such as `causal_lm` or `classification`.
      unit: what one output is about: losses and KL are in nats per unit.
      quality: the task's own measure; `analysis.measures` says how each is shown.
      agreement: how alike quantized model and original decide.
    """

    name: str
    unit: str
    quality: Literal["perplexity", "accuracy", "spearman", "mse", "loss"]
    agreement: Literal["top1_agreement", "cosine", "likeness"]

    @property
    def nats(self) -> str:
        """The unit of losses: `nats per token`."""
        return f"nats per {self.unit}"

    @property
    def material(self) -> str:
        """What the model is measured on, in a word."""
        return "text" if self.unit == "token" else "data"

    @property
    def keys(self) -> dict[str, str]:
        """Field of an evaluation -> its key in the file: quality -> `perplexity`, agreement -> `top1_agreement`."""
        return {
            "quality": self.quality,
            "quality_stderr": f"{self.quality}_stderr",
            "agreement": self.agreement,
            "agreement_stderr": f"{self.agreement.removesuffix('_agreement')}_stderr",
        }


CAUSAL_LM = TaskInfo("causal_lm", "token", "perplexity", "top1_agreement")
"""The task of a file that names none."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The original model.

    Attributes:
      parameters: number of all its parameters.
      weights: number of those in quantizable weights; bits per weight are over these.
      reference_size_bytes: as stored originally.
    """

    name: str
    parameters: int
    weights: int
    reference_size_bytes: int
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """One data set; `num_outputs` counts what was predicted: tokens of a text, or examples."""

    source: str
    digest: str
    num_documents: int
    num_outputs: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The original model on the test set; None is what the task or the data has not."""

    quality: float | None = dataclasses.field(metadata=_BY_TASK)
    nll: float | None
    nll_stderr: float | None = None
    quality_stderr: float | None = dataclasses.field(default=None, metadata=_BY_TASK)


@dataclasses.dataclass(frozen=True)
class FrontierInfo:
    """Predicted loss of every point of the exact frontier, sizes ascending; `metric` is the one that allocates.

    `predicted_kl` are sums over weights, `corrected_kl` the same corrected by plans measured on the selection set.
    """

    metric: str
    bits_per_weight: tuple[float, ...]
    size_bytes: tuple[int, ...]
    predicted_kl: tuple[float, ...]
    predicted_stderr: tuple[float | None, ...] | None = None
    corrected_kl: tuple[float, ...] | None = None
    corrected_stderr: tuple[float | None, ...] | None = None

    @property
    def best_kl(self) -> tuple[float, ...]:
        """Corrected, where it could be."""
        return self.corrected_kl or self.predicted_kl

    @property
    def best_stderr(self) -> tuple[float | None, ...] | None:
        """Of `best_kl`."""
        return self.corrected_stderr if self.corrected_kl else self.predicted_stderr


MADE_BETTER = ("propagated", "corrected", "distilled")
"""Kinds of plans with the choices of another one, whose weights were made otherwise."""


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """One plan, rounded by one method and measured on the test set; (`name`, `method`) is unique.

    Attributes:
      kind: `mixed` (a solution of the knapsack), `uniform` (every weight under `scheme`), `heuristic` (a fixed mix), or
        any of these made better: `propagated` (each weight makes up for those before it), `corrected` (biases and
        norms make up for all), `distilled` (trained).
      handed_out: its budget ends with this plan, and it is plainly rounded or the best way to make it.
      quality: None without labels, and where it is not finite (a perplexity that overflows).
      nll: None without labels, and for embeddings, which have no right answer.
      agreement: with the original; 1 where both decide alike.
      choices: path of the weight -> scheme.
      predicted_kl, corrected_kl: sum over weights; the same corrected by the other plans measured on the selection set.
    """

    name: str
    kind: Literal["mixed", "uniform", "heuristic", "propagated", "corrected", "distilled"]
    method: str
    handed_out: bool
    size_bytes: int
    bits_per_weight: float
    quality: float | None = dataclasses.field(metadata=_BY_TASK)
    nll: float | None
    nll_stderr: float | None
    kl: float
    kl_stderr: float | None
    agreement: float = dataclasses.field(metadata=_BY_TASK)
    agreement_stderr: float | None = dataclasses.field(metadata=_BY_TASK)
    num_documents: int
    choices: Mapping[str, str]
    scheme: str | None = None
    predicted_kl: float | None = None
    predicted_stderr: float | None = None
    corrected_kl: float | None = None
    corrected_stderr: float | None = None
    quality_stderr: float | None = dataclasses.field(default=None, metadata=_BY_TASK)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A mixed plan against the best uniform scheme that fits its budget, paired by document.

    Attributes:
      baseline: that scheme; None if none fits, and then the numbers are None too.
      kl_difference: KL of the plan less KL of the baseline: negative where mixing helps.
      z: `kl_difference / stderr`.
      method: rounding algorithm of both; None: the method of the plan's first entry.
      budget: as it was asked for.
    """

    plan: str
    baseline: str | None
    bits_per_weight: float
    kl_difference: float | None = None
    stderr: float | None = None
    z: float | None = None
    method: str | None = None
    budget: str | None = None


@dataclasses.dataclass(frozen=True)
class Winner:
    """What a budget ends with: the best on the selection set of the mixed, the uniform and the heuristic plan.

    Attributes:
      method: the best on the selection set of the ways to make its weights; None: there was one.
      ways_kl: by way.
    """

    plan: str
    selection_kl: Mapping[str, float]
    method: str | None = None
    ways_kl: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StabilityInfo:
    """How sure the choices of a plan are: what resamples of the sensitivities would choose.

    Attributes:
      statement: what was found, or why there are no resamples.
      share: path -> part of the resamples that take the plan's scheme; None without resamples.
      unsure: paths of the weights of which more than 1 in 20 resamples take another scheme.
    """

    plan: str
    statement: str
    share: Mapping[str, float] | None
    unsure: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TableInfo:
    """A sensitivity table: predicted loss increase of every weight (rows) alone under every scheme (columns)."""

    weights: tuple[str, ...]
    schemes: tuple[str, ...]
    loss_increase: tuple[tuple[float, ...], ...]
    stderr: tuple[tuple[float | None, ...], ...]
    metric: str | None = None

    @functools.cached_property
    def _row(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.weights)}

    def at(self, path: str, scheme: str) -> tuple[float, float | None] | None:
        """Loss increase and standard error of a weight under a scheme; None if the table lacks either."""
        if path not in self._row or scheme not in self.schemes:
            return None
        row, column = self._row[path], self.schemes.index(scheme)
        return self.loss_increase[row][column], self.stderr[row][column]


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """One quantizable weight `w[k, n]` of `size` values; weights of equal `group` share a scheme."""

    path: str
    group: str
    k: int
    n: int
    kind: str
    macs: int
    size: int


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Rank correlations of two metrics over all (weight, scheme) pairs."""

    kendall_tau: float | None
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """All numbers of a run."""

    schema: int
    model: ModelInfo
    data: Mapping[str, DataInfo]
    frontier: FrontierInfo
    plans: tuple[PlanResult, ...]
    comparisons: tuple[Comparison, ...]
    tables: Mapping[str, TableInfo]
    weights: tuple[WeightInfo, ...]
    agreement: Mapping[str, Agreement]
    name: str = "run"
    task: TaskInfo = CAUSAL_LM
    reference: Evaluation | None = None
    winners: Mapping[str, Winner] = dataclasses.field(default_factory=dict)
    stability: Mapping[str, StabilityInfo] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ranges: tuple[RangeInfo, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def has_quality(self) -> bool:
        """False without labels: then no model of this result has a quality."""
        return any(model.quality is not None for model in (*self.plans, self.reference) if model is not None)

    @property
    def allocation_table(self) -> TableInfo | None:
        """The table that the frontier was computed from."""
        for key, table in self.tables.items():
            if self.frontier.metric in (key, table.metric):
                return table
        return None

    @property
    def main_method(self) -> str:
        """The rounding algorithm of what is handed out."""
        handed_out = [plan.method for plan in self.plans if plan.handed_out]
        return (handed_out or [self.plans[0].method])[0]

    def plan(self, name: str, method: str | None = None) -> PlanResult | None:
        """The plan of this name under a method (any, if None)."""
        return next((p for p in self.plans if p.name == name and method in (None, p.method)), None)


def load_result(path: str | os.PathLike[str]) -> Result:
    """Read and check a `results.json`.

    Raises:
      MpqError: it is missing, no JSON, or a field is wrong; the field is named.
    """
    return parse_result(read_json(path, "results.json, as 'mpq run' writes it"))


def parse_result(data: Mapping[str, Any]) -> Result:
    """The checked result in plain data.

    Raises:
      MpqError: a field is missing, has the wrong type, or contradicts another one; the field is named.
    """
    if data.get("schema") != SCHEMA:
        raise MpqError(f"result: schema is {data.get('schema')!r}, this version reads {SCHEMA}: run again")
    task: TaskInfo = read(TaskInfo, data["task"], "task", {}) if "task" in data else CAUSAL_LM
    result: Result = read(Result, data, "", task.keys)
    for field, fault in _contradictions(result):
        raise MpqError(f"result: {field} {fault}")
    return result


def _contradictions(result: Result) -> Iterator[tuple[str, str]]:
    """Fields that disagree with each other: (field, what is wrong)."""
    paths = {weight.path for weight in result.weights}
    if sum(weight.size for weight in result.weights) != result.model.weights:
        yield "model.weights", "is not the sum of weights[].size: it counts the values of all quantizable weights"
    if not result.plans:
        yield "plans", "is empty: a result has at least one plan"
    seen = set()
    for i, plan in enumerate(result.plans):
        if (plan.name, plan.method) in seen:
            yield f"plans[{i}].name", f"{plan.name!r} occurs twice with method {plan.method!r}"
        seen.add((plan.name, plan.method))
        if plan.kind == "uniform" and plan.scheme is None:
            yield f"plans[{i}].scheme", "is missing: a uniform plan names its scheme"
        if differing := sorted(paths ^ set(plan.choices)):
            yield f"plans[{i}].choices", f"and weights differ in {differing[0]!r}"
    yield from _frontier_contradictions(result.frontier)
    for name, table in result.tables.items():
        shape = (len(table.weights), len(table.schemes))
        for field in ("loss_increase", "stderr"):
            rows = getattr(table, field)
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                yield f"tables.{name}.{field}", f"has not the shape {list(shape)} of weights and schemes"
        if odd := sorted(set(table.weights) - paths):
            yield f"tables.{name}.weights", f"names {odd[0]!r}, which is not in weights"
    for i, comparison in enumerate(result.comparisons):
        yield from _comparison_contradictions(result, comparison, f"comparisons[{i}]")


def _frontier_contradictions(frontier: FrontierInfo) -> Iterator[tuple[str, str]]:
    length = len(frontier.bits_per_weight)
    if length == 0:
        yield "frontier.bits_per_weight", "is empty: a frontier has at least one point"
    for field in ("size_bytes", "predicted_kl", "predicted_stderr", "corrected_kl", "corrected_stderr"):
        column = getattr(frontier, field)
        if column is not None and len(column) != length:
            yield f"frontier.{field}", f"has {len(column)} numbers, bits_per_weight {length}"
    if list(frontier.bits_per_weight) != sorted(frontier.bits_per_weight):
        yield "frontier.bits_per_weight", "is not ascending"


def _comparison_contradictions(result: Result, comparison: Comparison, where: str) -> Iterator[tuple[str, str]]:
    plan = result.plan(comparison.plan, comparison.method)
    if plan is None:
        yield f"{where}.plan", f"{comparison.plan!r} is not a plan of this result"
        return
    if comparison.baseline is None:
        return
    baseline = result.plan(comparison.baseline, plan.method)
    if baseline is None:
        yield f"{where}.baseline", f"{comparison.baseline!r} is not a plan of this result with method {plan.method!r}"
        return
    if comparison.kl_difference is None:
        yield f"{where}.kl_difference", "is missing though there is a baseline"
        return
    # Paired over the same documents, the difference is that of the means up to rounding; a wrong sign or plan is not.
    slack = 1e-6 * max(abs(plan.kl), abs(baseline.kl)) + 0.1 * (comparison.stderr or 0.0)
    if abs(comparison.kl_difference - (plan.kl - baseline.kl)) > slack:
        yield f"{where}.kl_difference", f"is not KL of {plan.name!r} less KL of {baseline.name!r}"
