r"""What rounded activations cost: W8A8 dynamic and static, W4A8, W4A4 and the KV cache, on a text and a shifted one.

Run:     python -m experiments.activations --model DIR --data TEXT --test TEXT --shifted TEXT --out FILE
Expect:  W8A8 with a scale for every token costs nearly nothing on both texts; a static range for a whole tensor needs
         smoothing or rotation wherever one token has huge values, and suffers more under a shift
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by setting and text, perplexity, its change in per cent, KL to the original and excess loss,
         nats per token, with standard errors over windows; and the seconds that the setting took

Weights and activations whose path does not match `--only` stay as they are. Text, windows and sizes are those of
`experiments.distillation`; static ranges, smoothing and what rotation is proved on
are of `--data` alone.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from experiments.distillation import windows_of
from experiments.kept import keep, named_options, rows_in
from mpq.activations import activation_rows, calibrate_activations
from mpq.activations.apply import RoundedActivation, choose_activations, with_activations
from mpq.activations.plans import split_plan, uniform_rows
from mpq.activations.smooth import smooth_model
from mpq.activations.turn import turn_model
from mpq.calibrate import calibrate
from mpq.config import known
from mpq.equalize import rotate
from mpq.evaluate import DocumentScores, Reference, score
from mpq.formats import parse_scheme
from mpq.models import Model, load
from mpq.quantize import QUANTIZERS, Candidates, apply_plan
from mpq.record import RunRecord
from mpq.trace import Trace
from mpq.types import LayerStats, MpqError, QTensor, Scheme


class Setting(NamedTuple):
    """A plan, the rounding algorithm of its weights, and whether the model is rotated, smoothed and rotated online."""

    plan: str
    method: str
    smooth: bool = False
    rotate: bool = False
    turn: bool = False


class Rounded(NamedTuple):
    """A model, its trace, rows that are rounded, and quantized weights by path."""

    model: Model
    traced: Trace
    chosen: tuple[RoundedActivation, ...]
    qtensors: dict[str, QTensor]


SETTINGS: Mapping[str, Setting] = {
    "W8": Setting("int8_channel", "rtn"),
    "W8A8 dynamic": Setting("int8_channel+int8_token", "rtn"),
    "W8A8 dynamic, zero point": Setting("int8_channel+int8_token_asym", "rtn"),
    "W8A8 dynamic, smoothed": Setting("int8_channel+int8_token", "rtn", smooth=True),
    "W8A8 dynamic, outliers apart": Setting("int8_channel+int8_token_outlier6", "rtn"),
    "W8A8 dynamic, outliers of calibration apart": Setting("int8_channel+int8_token_outlier6_static", "rtn"),
    "W8A8 static, absmax": Setting("int8_channel+int8_tensor_static_absmax", "rtn"),
    "W8A8 static, moving average": Setting("int8_channel+int8_tensor_static_moving_average", "rtn"),
    "W8A8 static, percentile": Setting("int8_channel+int8_tensor_static_percentile", "rtn"),
    "W8A8 static, MSE": Setting("int8_channel+int8_tensor_static", "rtn"),
    "W8A8 static, entropy": Setting("int8_channel+int8_tensor_static_entropy", "rtn"),
    "W8A8 static, absmax, smoothed": Setting("int8_channel+int8_tensor_static_absmax", "rtn", smooth=True),
    "W8A8 static, zero point, smoothed": Setting("int8_channel+int8_tensor_static_absmax_asym", "rtn", smooth=True),
    "W8g32A8 static, zero point, smoothed": Setting("int8_g32+int8_tensor_static_absmax_asym", "rtn", smooth=True),
    "W8A8KV8 dynamic": Setting("int8_channel+int8_token+int8_head", "rtn"),
    "W8A8KV4 dynamic": Setting("int8_channel+int8_token+int4_head_asym", "rtn"),
    "W4g32": Setting("int4_g32", "gptq"),
    "W4g32A8 dynamic": Setting("int4_g32+int8_token", "gptq"),
    "W4g32A8 static, zero point, smoothed": Setting("int4_g32+int8_tensor_static_absmax_asym", "gptq", smooth=True),
    "W4g32A4 dynamic": Setting("int4_g32+int4_token", "gptq"),
    "W4g32A4 dynamic, outliers apart": Setting("int4_g32+int4_token_outlier6", "gptq"),
    "W4g32A4 dynamic, outliers of calibration apart": Setting("int4_g32+int4_token_outlier6_static", "gptq"),
    "W4g32A4 dynamic, zero point": Setting("int4_g32+int4_token_asym", "gptq"),
    "W4g32A4 dynamic, zero point, smoothed": Setting("int4_g32+int4_token_asym", "gptq", smooth=True),
    "W8A8 dynamic, rotated": Setting("int8_channel+int8_token", "rtn", rotate=True),
    "W8A8 static, absmax, rotated": Setting("int8_channel+int8_tensor_static_absmax", "rtn", rotate=True),
    "W8A8 static, MSE, rotated": Setting("int8_channel+int8_tensor_static", "rtn", rotate=True),
    "W8A8 static, zero point, rotated, smoothed": Setting(
        "int8_channel+int8_tensor_static_absmax_asym", "rtn", smooth=True, rotate=True
    ),
    "W4": Setting("int4_channel", "gptq"),
    "W4, rotated": Setting("int4_channel", "gptq", rotate=True),
    "W4g32, rotated": Setting("int4_g32", "gptq", rotate=True),
    "W4g32A8 dynamic, rotated": Setting("int4_g32+int8_token", "gptq", rotate=True),
    "W4g32A4 dynamic, rotated": Setting("int4_g32+int4_token", "gptq", rotate=True),
    "W4g32A4 dynamic, zero point, rotated": Setting("int4_g32+int4_token_asym", "gptq", rotate=True),
    "W4g32A4 dynamic, zero point, rotated, smoothed": Setting(
        "int4_g32+int4_token_asym", "gptq", smooth=True, rotate=True
    ),
    "W8A8 dynamic, online": Setting("int8_channel+int8_token", "rtn", turn=True),
    "W8A8 static, absmax, online": Setting("int8_channel+int8_tensor_static_absmax", "rtn", turn=True),
    "W8A8 static, MSE, online": Setting("int8_channel+int8_tensor_static", "rtn", turn=True),
    "W8A8 static, moving average, online": Setting("int8_channel+int8_tensor_static_moving_average", "rtn", turn=True),
    "W8A8 static, percentile, online": Setting("int8_channel+int8_tensor_static_percentile", "rtn", turn=True),
    "W8A8 static, entropy, online": Setting("int8_channel+int8_tensor_static_entropy", "rtn", turn=True),
    "W8A8 static, MSE, smoothed": Setting("int8_channel+int8_tensor_static", "rtn", smooth=True),
    "W8A8 static, MSE, smoothed, online": Setting("int8_channel+int8_tensor_static", "rtn", smooth=True, turn=True),
    "W8A8 dynamic, groups": Setting("int8_channel+int8_g32", "rtn"),
    "W8A8 FP8 dynamic": Setting("fp8_e4m3_channel+fp8_e4m3_token", "rtn"),
    "W8A8 FP8 dynamic, online": Setting("fp8_e4m3_channel+fp8_e4m3_token", "rtn", turn=True),
    "W8A8 FP8 static, MSE": Setting("fp8_e4m3_channel+fp8_e4m3_tensor_static", "rtn"),
    "W4g32A8 static, absmax": Setting("int4_g32+int8_tensor_static_absmax", "gptq"),
    "W4g32A8 static, percentile": Setting("int4_g32+int8_tensor_static_percentile", "gptq"),
    "W4g32A8 static, MSE": Setting("int4_g32+int8_tensor_static", "gptq"),
    "W4g32A8 static, entropy": Setting("int4_g32+int8_tensor_static_entropy", "gptq"),
    "W4g32A8 dynamic, online": Setting("int4_g32+int8_token", "gptq", turn=True),
    "W4g32A8 static, MSE, online": Setting("int4_g32+int8_tensor_static", "gptq", turn=True),
    "W4g32A4 dynamic, groups": Setting("int4_g32+int4_g32", "gptq"),
    "W4g32A4 dynamic, groups, zero point": Setting("int4_g32+int4_g32_asym", "gptq"),
    "W4g32A4 dynamic, groups, online": Setting("int4_g32+int4_g32", "gptq", turn=True),
    "W4g32A4 dynamic, groups, zero point, online": Setting("int4_g32+int4_g32_asym", "gptq", turn=True),
    "W4g32A4 static, MSE, smoothed": Setting("int4_g32+int4_tensor_static", "gptq", smooth=True),
    "W4g32A4 static, MSE, smoothed, online": Setting("int4_g32+int4_tensor_static", "gptq", smooth=True, turn=True),
    "W8A8 static, zero point, smoothed, online": Setting(
        "int8_channel+int8_tensor_static_absmax_asym", "rtn", smooth=True, turn=True
    ),
    "W4g32A8 static, zero point, smoothed, online": Setting(
        "int4_g32+int8_tensor_static_absmax_asym", "gptq", smooth=True, turn=True
    ),
    "W4g32A4 dynamic, online": Setting("int4_g32+int4_token", "gptq", turn=True),
    "W4g32A4 dynamic, zero point, online": Setting("int4_g32+int4_token_asym", "gptq", turn=True),
    "W4g32A4 dynamic, rotated, online": Setting("int4_g32+int4_token", "gptq", rotate=True, turn=True),
    "W4g32A4 dynamic, zero point, rotated, online": Setting("int4_g32+int4_token_asym", "gptq", rotate=True, turn=True),
    "W4g32A4 dynamic, zero point, smoothed, online": Setting(
        "int4_g32+int4_token_asym", "gptq", smooth=True, turn=True
    ),
}
"""By name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a folder, or `reference`.
      data, test, shifted: calibration text, held-out text like it, and text of another domain.
      out: JSON file.
      only: regular expression of the weights that are quantized, and of those whose inputs are rounded.
      settings: of `SETTINGS`.
      windows: of every text, `window` tokens each, `batch_size` a pass.
      seed: of the rotations.
    """

    model: str
    data: Path
    test: Path
    shifted: Path
    out: Path
    only: str = "layers"
    settings: tuple[str, ...] = tuple(SETTINGS)
    windows: int = 64
    window: int = 256
    batch_size: int = 8
    seed: int = 0


class Comparison:
    """The model, its texts, and statistics that settings share."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        self.traced = self.model.trace(options.batch_size, options.window)
        read = lambda path: windows_of(self.model, path, options.windows, options.window)
        self.calibration = read(options.data)
        paths = {"test": options.test, "shifted": options.shifted}
        self.references = {name: Reference(self.model, read(path), options.batch_size) for name, path in paths.items()}
        self.stats = calibrate(self.traced, self.model.params, self.calibration, options.batch_size)
        self.weights = tuple(w for w in self.traced.weights if re.search(options.only, w.path))
        if not self.weights:
            raise MpqError(f"no weight matches {options.only!r}: name some of {self.traced.weights[0].path} ...")
        self.original = {name: self.scores(name, self.model, self.model.params) for name in self.references}

    def scores(self, text: str, model: Model, params: Mapping[str, jax.Array]) -> DocumentScores:
        """Of one text."""
        reference = self.references[text]
        return score(model, dict(params), reference.data, reference=reference, batch_size=0)

    @functools.cached_property
    def rotated(self) -> tuple[Model, Trace, Mapping[str, LayerStats]]:
        """The model rotated, with its trace and statistics."""
        made = rotate(self.model, self.traced, self.calibration, jax.random.key(self.options.seed))
        stats = calibrate(made.traced, made.model.params, self.calibration, self.options.batch_size)
        return made.model, made.traced, stats

    def made(self, setting: Setting) -> tuple[Model, dict[str, jax.Array]]:
        """The rounded model and its parameters."""
        model, traced, chosen, qtensors = self.rounded(setting)
        return with_activations(model, traced, chosen), apply_plan(model.params, traced.weights, qtensors)

    def rounded(self, setting: Setting) -> Rounded:
        """A setting's model, which may be smoothed and rotated, with what is rounded of it."""
        options, (plan, method, smooth, whole, turn) = self.options, setting
        model, traced, stats = self.rotated if whole else (self.model, self.traced, self.stats)
        source, activations, kv = split_plan(plan)
        entries = uniform_rows(traced, activations, kv)
        chosen = tuple(
            RoundedActivation.from_json(row) for path, row in entries.items() if re.search(options.only, path)
        )
        choice = self.choice(source)
        if smooth:
            everything = (choice, stats, self.calibration, options.batch_size)
            model, chosen, stats = smooth_model(model, traced, chosen, *everything)
        elif static := [one.spec for one in chosen if one.scheme.is_calibrated]:
            found = calibrate_activations(model, traced, static, self.calibration, batch_size=options.batch_size)
            chosen = choose_activations({one.spec: one.scheme for one in chosen}, found)
        if turn:
            everything = (choice, stats, self.calibration, options.batch_size, options.seed)
            model, chosen, stats = turn_model(model, traced, chosen, *everything)
        candidates = Candidates(model.params, traced.weights, QUANTIZERS[method], stats)
        return Rounded(model, traced, chosen, candidates.choose(choice))

    def choice(self, text: str) -> dict[str, Scheme]:
        """One scheme for the weights that are quantized."""
        return {w.path: parse_scheme(text) for w in self.weights}

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a setting, those in `done` left out."""
        known = {row["setting"] for row in done}
        for name in self.options.settings:
            if name not in known:
                start = time.perf_counter()
                model, params = self.made(SETTINGS[name])
                jax.block_until_ready(params)
                row = {"setting": name, **SETTINGS[name]._asdict()}
                row["seconds"] = round(time.perf_counter() - start, 1)
                yield row | {text: self.quality(text, model, params) for text in self.references}

    def quality(self, text: str, model: Model, params: Mapping[str, jax.Array]) -> dict[str, float | None]:
        """On one text, against the original."""
        scores = self.scores(text, model, params)
        excess, stderr = scores.difference(self.original[text], "nll")
        result, before = scores.summary(), self.original[text].summary()
        assert result.quality is not None  # a text has next tokens
        assert before.quality is not None
        return {
            "perplexity": result.quality,
            "change_percent": 100 * (result.quality / before.quality - 1),
            "excess": excess,
            "excess_stderr": stderr,
            "kl": result.kl,
            "kl_stderr": result.kl_stderr,
        }


def main(options: Options) -> None:
    """Measure, print, write after every row.

    Raises:
      MpqError: a setting is not among those there are, or the model or a text is wrong.
    """
    for name in options.settings:
        known("setting", name, SETTINGS)
    done = rows_in(options.out)
    comparison = Comparison(options)
    files = ("data", "test", "shifted", "out")
    config = named_options(options, files)
    inputs = {"data": comparison.calibration.digest, "model": comparison.model.digest}
    inputs |= {name: reference.data.digest for name, reference in comparison.references.items()}
    record = RunRecord.collect(config | {"model": comparison.model.name}, seeds={"rotate": options.seed}, inputs=inputs)
    head = {
        "perplexity": {name: scores.summary().quality for name, scores in comparison.original.items()},
        "values": sum(row.values for row in activation_rows(comparison.traced)),
        "record": record.to_json(),
    }
    keep(comparison.rows(done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
