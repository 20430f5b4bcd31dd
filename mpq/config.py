"""`RunConfig`: all that decides what `mpq run` computes. A config file is Python that defines `CONFIG`."""

import dataclasses
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq.activations.scheme import parse_activation_scheme
from mpq.formats import parse_scheme
from mpq.quantize import QUANTIZERS
from mpq.sensitivity import METRICS
from mpq.types import MpqError


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run of the whole pipeline.

    Attributes:
      name: of the run folder.
      model: folder, hub id or `reference`.
      data: a text file, split into calibration, selection and test; or `reference`, the texts shipped with the
        reference model.
      schemes: candidates of every weight, and the uniform baselines.
      metrics: sensitivity metrics to compute; `allocate_by` is the one the knapsack uses.
      method: rounding algorithm whose error is scored, and which the model handed out is made with.
      compare_methods: further algorithms, each with plans of its own, solved from its own errors by the metric
        `compare_by`.
      budgets: `3.5bpw`, a whole-model size such as `4MB`, or a scheme: the exact size of that uniform scheme.
      hand_out: the budget whose winner is exported.
      window: tokens a window; `batch_size`: windows a batch.
      calibration_windows: those of the metrics and of `refine_windows`, and all others, for the statistics that
        rounding uses: an error that was minimized on a text looks smaller there than anywhere else.
      sensitivity_windows: of the calibration set, for the metrics by name; `(name, windows)` pairs. Default: one batch.
      selection_windows: for the choice between the solution and uniform schemes.
      test_windows: for every number reported.
      windows_per_document: at most so many of one document, so that standard errors see many documents; None: all.
      refine_rounds: most rounds of the search on measured plans that follows the exact solution, for `method` alone;
        0: the exact solution as it is.
      gradient_steps: of a search by gradient (`mpq.distill.mixture`) for every budget, for `method` alone; the better
        of its plan and the exact solution, measured, is reported, and refined if asked for. 0: none.
      refine_windows: of the calibration set, that these two searches take and plans are measured on.
      guided: rounding goes by grams in which tokens count by how much the end loss depends on them (`mpq.guide`).
      propagate: the winner of every budget is rounded once more with each weight making up for those before it
        (`mpq.quantize.propagate`); it is handed out so if that is better on the selection set.
      correct: and its biases and norms are corrected for what rounding does to layers' outputs on average
        (`mpq.quantize.correction`), where there are some behind weights; likewise.
      distill_steps: of distillation of the plan that is handed out, on the calibration set; it is handed out distilled
        if that is better on the selection set. 0: none.
      activations: scheme of all activations, `int8_token`, or of these and of the KV cache, `int8_token+int8_head`
        (`keep+int8_head`: of the cache alone), under which every plan is measured and handed out. Empty: floating
        point.
      seed: of all random numbers.
    """

    name: str
    model: str = "reference"
    data: str = "reference"
    schemes: tuple[str, ...] = ("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16")
    metrics: tuple[str, ...] = ("kl", "fisher", "hessian_trace")
    allocate_by: str = "kl"
    method: str = "gptq"
    compare_methods: tuple[str, ...] = ("rtn",)
    compare_by: str = "fisher"
    budgets: tuple[str, ...] = ("3.0bpw", "int3_g64", "3.5bpw", "int4_g64")
    hand_out: str = "3.5bpw"
    window: int = 256
    batch_size: int = 8
    calibration_windows: int = 64
    sensitivity_windows: tuple[tuple[str, int], ...] = (("kl", 8), ("fisher", 16), ("hessian_trace", 2))
    selection_windows: int = 32
    test_windows: int = 64
    windows_per_document: int | None = 4
    refine_rounds: int = 0
    gradient_steps: int = 0
    refine_windows: int = 16
    guided: bool = False
    propagate: bool = True
    correct: bool = True
    distill_steps: int = 0
    activations: str = ""
    seed: int = 0

    def windows_of(self, metric: str) -> int:
        """Windows that a metric is measured on."""
        return dict(self.sensitivity_windows).get(metric, self.batch_size)

    @property
    def scored_windows(self) -> int:
        """Windows of the calibration set on which losses are measured; statistics are made of the others."""
        metrics = {*self.metrics, *([self.compare_by] if self.compare_methods else [])}
        return max(*map(self.windows_of, metrics), self.refine_windows if self.searches else 0)

    @property
    def searches(self) -> bool:
        """Whether solutions are searched on, on measured plans."""
        return self.refine_rounds > 0 or self.gradient_steps > 0

    def check(self) -> None:
        """Refuse unknown names before anything is computed.

        Raises:
          MpqError: an unknown metric, method or scheme (the valid ones are listed), or a value out of range.
        """
        for scheme in self.schemes:
            parse_scheme(scheme)
        if not self.schemes:
            raise MpqError("schemes is empty: give at least one, such as int4_g64")
        for metric in (*self.metrics, self.allocate_by, self.compare_by):
            known("metric", metric, METRICS)
        for scheme in self.activations.split("+") if self.activations else ():
            if scheme != "keep":
                parse_activation_scheme(scheme)
        for method in (self.method, *self.compare_methods):
            known("method", method, QUANTIZERS)
        if self.allocate_by not in self.metrics:
            raise MpqError(
                f"allocate_by {self.allocate_by!r} is not among the metrics {', '.join(self.metrics)}: add it"
            )
        if self.hand_out not in self.budgets:
            raise MpqError(f"hand_out {self.hand_out!r} is not among the budgets {', '.join(self.budgets)}: add it")
        if self.refine_rounds < 0:
            raise MpqError(f"refine_rounds is {self.refine_rounds}: it must be at least 0, which is no search")
        if self.gradient_steps < 0:
            raise MpqError(f"gradient_steps is {self.gradient_steps}: it must be at least 0, which is no search")
        if self.distill_steps < 0:
            raise MpqError(f"distill_steps is {self.distill_steps}: it must be at least 0, which is no distillation")
        for field in (
            "window",
            "refine_windows",
            "batch_size",
            "calibration_windows",
            "selection_windows",
            "test_windows",
        ):
            if getattr(self, field) < 1:
                raise MpqError(f"{field} is {getattr(self, field)}: it must be at least 1")


def known(kind: str, name: str, table: typing.Mapping[str, Any]) -> Any:
    """`table[name]`.

    Raises:
      MpqError: there is no such name; lists those there are.
    """
    if name not in table:
        raise MpqError(f"unknown {kind} {name!r}: the valid ones are {', '.join(table)}")
    return table[name]


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The `CONFIG` of a Python file, with `key=value` overrides applied.

    Raises:
      MpqError: no such file, it fails, it has no `CONFIG`, or an override is wrong.
    """
    if not Path(path).is_file():
        raise MpqError(
            f"config {path!r} does not exist: give a Python file that defines CONFIG, "
            "such as experiments/configs/quickstart.py"
        )
    try:
        config = runpy.run_path(path).get("CONFIG")
    except Exception as error:  # a config is the user's code and may fail in any way
        raise MpqError(f"config {path!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise MpqError(
            f"config {path!r} defines no CONFIG of type mpq.RunConfig: write CONFIG = mpq.RunConfig(name=...)"
        )
    for override in overrides:
        config = _override(config, override)
    return config


def _override(config: RunConfig, text: str) -> RunConfig:
    key, equals, value = text.partition("=")
    hints = typing.get_type_hints(RunConfig)
    if not equals or key not in hints:
        raise MpqError(f"--set {text!r} is wrong: write key=value with a key of {', '.join(hints)}")
    try:
        return dataclasses.replace(config, **{key: _parse(value, hints[key])})
    except ValueError as error:
        raise MpqError(f"--set {text!r}: {value!r} does not fit {key} ({error})") from error


def _parse_bool(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError("it must be true or false")
    return value.lower() == "true"


def _parse(value: str, hint: Any) -> Any:
    if hint is int:
        return int(value)
    if hint is str:
        return value
    if hint is bool:
        return _parse_bool(value)
    if typing.get_origin(hint) is types.UnionType:
        return None if value.lower() == "none" else int(value)
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if typing.get_args(hint)[0] is str:
        return parts
    pairs = (part.partition(":") for part in parts)  # sensitivity_windows=kl:8,fisher:32
    return tuple((name, int(windows)) for name, _, windows in pairs)
