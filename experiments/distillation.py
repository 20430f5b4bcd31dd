r"""What each ingredient buys at a size: allocation, finer scales, propagation, distilled scales and codes, more text.

Run:     python -m experiments.distillation --model DIR --data TEXT --test TEXT --out FILE
Expect:  every ingredient lowers the KL on held-out text; the order of the rows is the order in which they are added
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by budget and ingredient, bits per weight, KL to the original and excess loss, nats per token

Weights whose path does not match `--only` stay as they are and are not counted, as where linear weights of the blocks
alone are quantized. A text is one stream of tokens, cut into windows; the first token of each becomes BOS. Sizes
count codes, scales and zero points. The excess is the rise of the loss; `*_stderr` are over windows.
"""

import copy
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.kept import keep, named_options, rows_in
from mpq.allocate import Frontier, Problem, solve_frontier
from mpq.calibrate import Weighting, calibrate
from mpq.data import new_dataset, take
from mpq.data.text import plain_tokenizer
from mpq.distill import Distill
from mpq.equalize import Fold, awq, find_folds, rotate
from mpq.evaluate import DocumentScores, Reference, score
from mpq.formats import parse_scheme
from mpq.guide import Guide
from mpq.inputs import Dataset, Tokens
from mpq.models import Model, load
from mpq.quantize import GPTQ, RTN, Candidates, apply_plan
from mpq.quantize.propagate import Propagation
from mpq.sensitivity import METRICS
from mpq.types import MpqError, QTensor, Scheme, SensitivityTable

GIVEN: Mapping[str, Any] = {"rounding": 0.02, "scale": 0.003, "zero_point": 0.02, "written": 0}
AS_IT_IS: Mapping[str, Any] = GIVEN | {"noise": 0.0, "splice": False}
TRAINED: Mapping[str, Mapping[str, Any]] = {
    "scales": AS_IT_IS | {"rounding": 0.0},
    "scales_written": {"rounding": 0.0, "scale": 0.005, "written": 1280},
    "codes": AS_IT_IS,
    "varied": GIVEN,
    "written": {},
}
"""Ingredient -> how a distillation on the text given differs from the default, on text that the model writes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: a folder, or `reference`.
      data, test: calibration and held-out text.
      out: JSON file.
      only: regular expression of the weights that are quantized.
      budgets: bits per quantized weight.
      uniform: the first ingredient is the largest of these that fits, the second a choice among them for each weight.
      fine: the third adds these to choose from.
      learned: the ingredients of that name add these, too.
      trellis: those of that name these, instead.
      ingredients: which of the twenty-one.
      steps: of a distillation.
      windows: of either text, `window` tokens each, `batch_size` a pass.
      sensitivity_windows: of the calibration text, for the table that plans are solved from.
    """

    model: str
    data: Path
    test: Path
    out: Path
    only: str = "layers"
    budgets: tuple[float, ...] = (2.5, 2.9, 3.5, 3.9, 4.5)
    uniform: tuple[str, ...] = ("int2_g32", "int3_g32", "int4_g32", "int5_g32", "int6_g32")
    fine: tuple[str, ...] = (
        "int2_g16_sfp8",
        "int3_g16_sfp8",
        "int4_g16_sfp8",
        "int2_g32_sfp8",
        "int3_g32_sfp8",
        "int4_g32_sfp8",
    )
    learned: tuple[str, ...] = tuple(f"lut{bits}_g{group}_sfp8" for group in (16, 32) for bits in (2, 3, 4))
    trellis: tuple[str, ...] = tuple(f"tcq{bits}_{group}" for group in ("channel", "g64_sfp8") for bits in (2, 3, 4, 5))
    ingredients: tuple[str, ...] = (
        "uniform",
        "allocated",
        "fine",
        "propagated",
        "nearest",
        "nearest_scales_written",
        "scales",
        "scales_written",
        "codes",
        "varied",
        "propagated_varied",
        "propagated_written",
        "learned",
        "learned_varied",
        "learned_written",
        "guided",
        "guided_varied",
        "guided_written",
        "trellis",
        "trellis_written",
        "guided_trellis",
    )
    steps: int = 600
    windows: int = 64
    window: int = 256
    batch_size: int = 8
    sensitivity_windows: int = 16


class Comparison:
    """The model, its text and its candidates."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        self.traced = self.model.trace(options.batch_size, options.window)
        read = lambda path: windows_of(self.model, path, options.windows, options.window)
        self.calibration, test = read(options.data), read(options.test)
        self.reference = Reference(self.model, test, options.batch_size)
        self.stats = calibrate(self.traced, self.model.params, self.calibration, options.batch_size)
        self.candidates = Candidates(self.model.params, self.traced.weights, GPTQ(), self.stats)
        self.weightings: Sequence[Weighting] | None = None
        self.weights = tuple(w for w in self.traced.weights if re.search(options.only, w.path))
        if not self.weights:
            raise MpqError(f"no weight matches {options.only!r}: name some of {self.traced.weights[0].path} ...")
        self.original = self.scores({})

    def of_all_weights(self) -> "Comparison":
        """The same of every weight, before any table or plan was asked for: nothing is read or measured again."""
        whole = copy.copy(self)
        whole.options, whole.weights = dataclasses.replace(self.options, only=""), self.traced.weights
        return whole

    @functools.cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Scales that can move between layers."""
        return find_folds(self.model, self.traced, self.calibration)

    def equalized(self, choice: dict[str, Scheme]) -> "Comparison":
        """The same with scales moved between layers by AWQ, for weights rounded to these schemes."""
        moved = copy.copy(self)
        moved.model, moved.stats, _ = awq(self.model, self.traced, self.folds, choice, self.stats)
        moved.candidates = Candidates(moved.model.params, self.traced.weights, GPTQ(), moved.stats)
        return moved

    def rotated(self, seed: int) -> "Comparison":
        """The same of the model rotated; of its head too, where that got a table of its own."""
        made = rotate(self.model, self.traced, self.calibration, jax.random.key(seed))
        turned = copy.copy(self)
        turned.__dict__.pop("folds", None)
        turned.model, turned.traced = made.model, made.traced
        turned.stats = calibrate(made.traced, made.model.params, self.calibration, self.options.batch_size)
        turned.weights = tuple(w for w in made.traced.weights if re.search(self.options.only, w.path))
        turned.candidates = Candidates(made.model.params, made.traced.weights, GPTQ(), turned.stats)
        return turned

    def guided(self, guide: Guide) -> "Comparison":
        """The same where rounding goes by grams of tokens that the end loss weights."""
        led = self._anew()
        size = self.options.batch_size
        led.weightings = guide.kept(self.model, self.traced, self.calibration, size)
        led.stats = calibrate(self.traced, self.model.params, self.calibration, size, led.weightings)
        led.candidates = Candidates(self.model.params, self.traced.weights, GPTQ(), led.stats)
        return led

    def propagated(self, candidates: Candidates, choice: dict[str, Scheme]) -> dict[str, QTensor]:
        """Weights rounded in the order of execution, each making up for those before it."""
        options: dict[str, Any] = {"batch_size": self.options.batch_size, "weightings": self.weightings}
        return Propagation(self.traced, candidates, self.calibration, **options).choose(choice)

    def scores(self, qtensors: dict[str, QTensor]) -> DocumentScores:
        """On the held-out text."""
        params = apply_plan(self.model.params, self.traced.weights, qtensors)
        return score(self.model, params, self.reference.data, reference=self.reference, batch_size=0)

    @functools.cached_property
    def table(self) -> SensitivityTable:
        """Monte Carlo Fisher of GPTQ's errors: of the weights that are quantized, under all schemes."""
        table = METRICS["fisher"](
            self.model,
            self.traced,
            tuple(map(parse_scheme, (*self.options.uniform, *self.options.fine))),
            self.candidates,
            take(self.calibration, self.options.sensitivity_windows),
            key=jax.random.key(0),
            batch_size=self.options.batch_size,
        )
        rows = [i for i, w in enumerate(table.weights) if w in self.weights]
        part = {"loss_increase": table.loss_increase[rows], "stderr": table.stderr[rows]}
        return dataclasses.replace(table, weights=self.weights, **part)

    @functools.cached_property
    def fine(self) -> Frontier:
        """Of all schemes."""
        return solve_frontier(Problem.from_table(self.table))

    @functools.cached_property
    def coarse(self) -> Frontier:
        """Of the schemes that the first ingredient takes one of."""
        few, table = len(self.options.uniform), self.table
        part = {"loss_increase": table.loss_increase[:, :few], "stderr": table.stderr[:, :few]}
        return solve_frontier(Problem.from_table(dataclasses.replace(table, schemes=table.schemes[:few], **part)))

    @functools.cached_property
    def nearest(self) -> Candidates:
        """Of weights rounded to nearest, with the best scales."""
        return Candidates(self.model.params, self.traced.weights, RTN(scale="mse"), self.stats)

    @functools.cached_property
    def learned(self) -> "Comparison":
        """The same with learned levels to choose from."""
        return self._with(self.options.learned)

    @functools.cached_property
    def trellis(self) -> "Comparison":
        """The same with codes along a trellis to choose from."""
        return self._with(self.options.trellis)

    @functools.cached_property
    def led(self) -> "Comparison":
        """The same under the pipeline's own guide."""
        return self.guided(Guide())

    def _with(self, schemes: Sequence[str]) -> "Comparison":
        more = self._anew()
        more.options = dataclasses.replace(self.options, fine=(*self.options.fine, *schemes))
        return more

    def _anew(self) -> "Comparison":
        """A copy without the tables and plans of this one."""
        more = copy.copy(self)
        for name in ("table", "fine", "coarse", "learned", "trellis", "led"):
            more.__dict__.pop(name, None)
        return more

    def uniform(self, bits: int) -> dict[str, Scheme]:
        """The largest uniform scheme that fits."""
        size = lambda scheme: sum(w.size_bits(scheme) for w in self.weights)
        fitting = [s for s in map(parse_scheme, self.options.uniform) if size(s) <= bits]
        if not fitting:
            raise MpqError(f"no scheme of {', '.join(self.options.uniform)} fits {bits} bits: give a larger budget")
        return dict.fromkeys((w.path for w in self.weights), max(fitting, key=size))

    def plan(self, ingredient: str, bits: int) -> dict[str, QTensor]:
        """The weights of an ingredient, as `analysis.distillation.INGREDIENTS` says it in words."""
        if ingredient == "uniform":
            return self.candidates.choose(self.uniform(bits))
        if ingredient == "allocated":
            return self.candidates.choose(self.coarse.at(bits=bits).choice)
        if ingredient == "guided_trellis":
            return self.led.plan("trellis", bits)
        if ingredient.startswith("trellis"):
            return self.trellis.plan(ingredient.replace("trellis", "propagated"), bits)
        if ingredient.startswith("guided"):
            return self.led.plan(ingredient.replace("guided", "learned"), bits)
        if ingredient.startswith("learned"):
            return self.learned.plan(ingredient.replace("learned", "propagated"), bits)
        choice, (first, _, training) = self.fine.at(bits=bits).choice, ingredient.partition("_")
        if first == "propagated":
            qtensors = self.propagated(self.candidates, choice)
        elif first == "nearest":
            qtensors = self.nearest.choose(choice)
        else:
            qtensors, training = self.candidates.choose(choice), ingredient
        if training in ("", "fine"):
            return qtensors
        distill = Distill(steps=self.options.steps, batch_size=self.options.batch_size, **TRAINED[training])
        return distill(self.model, self.traced, qtensors, self.calibration, key=jax.random.key(0)).qtensors

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a budget and ingredient, those in `done` left out."""
        known = {(row["budget"], row["ingredient"]) for row in done}
        values = sum(w.size for w in self.weights)
        for budget, ingredient in itertools.product(self.options.budgets, self.options.ingredients):
            if (budget, ingredient) not in known:
                start = time.perf_counter()
                qtensors = self.plan(ingredient, int(budget * values))
                seconds = time.perf_counter() - start
                yield {"budget": budget, "ingredient": ingredient, "seconds": round(seconds, 1), **self.row(qtensors)}

    def row(self, qtensors: dict[str, QTensor]) -> dict[str, Any]:
        """Size and quality of a plan."""
        schemes = [str(q.scheme) for q in qtensors.values()]
        size = sum(w.size_bits(qtensors[w.path].scheme) for w in self.weights)
        return {
            "bits_per_weight": size / sum(w.size for w in self.weights),
            **quality(self.scores(qtensors), self.original),
            "schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
        }


def quality(scores: DocumentScores, original: DocumentScores) -> dict[str, float | None]:
    """Of a model on a text, against the original's own scores there."""
    excess, stderr = scores.difference(original, "nll")
    result = scores.summary()
    return {
        "excess": excess,
        "excess_stderr": stderr,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.quality,
    }


def windows_of(model: Model, path: Path, windows: int, window: int) -> Dataset:
    """The first so many windows of a text as one stream, `window` tokens each, each a document of its own."""
    if not isinstance(model.inputs, Tokens):
        raise MpqError(f"model {model.name!r} reads no text: give a language model")
    bos = [] if model.inputs.bos is None else [model.inputs.bos]
    ids = [*bos, *plain_tokenizer(model.tokenizer).encode(path.read_text(), add_special_tokens=False).ids]
    count = min(len(ids) // window, windows)
    tokens = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    tokens[:, : len(bos)] = bos
    return new_dataset(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32), path.name)


def main(options: Options) -> None:
    """Compare, print, write after every row."""
    done = rows_in(options.out, "results of a distillation")
    comparison = Comparison(options)
    named = named_options(options, ("data", "test", "out"))
    head = {
        "options": named | {"model": comparison.model.name},
        "distill": dataclasses.asdict(Distill(steps=options.steps, batch_size=options.batch_size)),
        "trained": TRAINED,
        "perplexity": comparison.original.summary().quality,
    }
    keep(comparison.rows(done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
