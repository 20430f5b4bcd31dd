r"""What bias correction, norms estimated again and equalization buy on images: plans of weights, and of activations.

Run:     python -m experiments.conv_correction --model DIR --data FILE.npz --out FILE.json
Expect:  the lower the bits, the more; rounding to nearest gains most, for GPTQ's errors have a mean nearer to 0; with
         one scale for a whole matrix equalization gains at few bits
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by plan, rounding algorithm, equalization (of plans with one scale for a matrix, without and
         with it) and correction, top-1 and KL to the original in nats per image on
         the test set, with standard errors over images; `python -m analysis.corrections` draws up the table

Static ranges, statistics, factors of equalization and corrections come from the calibration images alone.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.kept import keep, rows_in
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import all_rows, split_plan
from mpq.calibrate import calibrate
from mpq.config import known
from mpq.data.sources import read_sets
from mpq.equalize import equalize, find_folds, find_shifts
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.models import Model, load
from mpq.quantize import QUANTIZERS, Candidates, apply_plan
from mpq.quantize.correction import correct_biases
from mpq.record import RunRecord
from mpq.types import Scheme

PLANS: Mapping[str, str] = {
    "W4": "int4_channel",
    "W3": "int3_channel",
    "W8A8 static": "int8_channel+int8_tensor_static",
    "W4A8 static": "int4_channel+int8_tensor_static",
    "W4A4 static": "int4_channel+int4_tensor_static",
    "W8, one scale": "int8_tensor",
    "W6, one scale": "int6_tensor",
    "W4, one scale": "int4_tensor",
    "W8A8 static, one scale": "int8_tensor+int8_tensor_static",
}
METHODS = ("rtn", "gptq")
CORRECTIONS: Mapping[str, bool | None] = {"none": None, "biases": False, "biases and norms": True}
"""Name -> whether norms are estimated again; None: nothing is corrected."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a folder of an image classifier.
      data: images and labels, `train_x`, `train_y`, `test_x`, `test_y`.
      out: JSON file.
      plans: of `PLANS`.
      methods: of `METHODS`, how weights are rounded.
      corrections: of `CORRECTIONS`.
      calibration, test: images of each.
      batch_size: images a pass.
    """

    model: str
    data: Path
    out: Path
    plans: tuple[str, ...] = tuple(PLANS)
    methods: tuple[str, ...] = METHODS
    corrections: tuple[str, ...] = tuple(CORRECTIONS)
    calibration: int = 512
    test: int = 932
    batch_size: int = 64


class Comparison:
    """The model, its images, and what plans share."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        limits = {"calibration": options.calibration, "selection": 1, "test": options.test}
        self.sets = read_sets(self.model, str(options.data), window=None, limits=limits, windows_per_document=None)
        self.traced = self.model.trace(options.batch_size)
        self.stats = calibrate(self.traced, self.model.params, self.sets["calibration"], options.batch_size)
        self.shifts = find_shifts(self.model, self.traced, self.sets["calibration"])
        self.reference = Reference(self.model, self.sets["test"], options.batch_size)

    def quality(self, model: Model, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """On the test set, against the original."""
        data = self.sets["test"]
        result = score(model, dict(params), data, reference=self.reference, batch_size=0).summary()
        return {"top1": result.quality, "kl": result.kl, "kl_stderr": result.kl_stderr}

    def equalized(self, choice: dict[str, Scheme]) -> "Comparison":
        """The same of the model with ranges alike, judged against the original."""
        same, data, size = copy.copy(self), self.sets["calibration"], self.options.batch_size
        folds = find_folds(self.model, self.traced, data, convs=True)
        same.model = equalize(self.model, self.traced, folds, self.shifts, choice, self.stats)
        same.stats = calibrate(self.traced, same.model.params, data, size)
        return same

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a plan, rounding algorithm, equalization and correction, those in `done` left out."""
        known = {(row["plan"], row["method"], row.get("equalized", False), row["correction"]) for row in done}
        for name in self.options.plans:
            choice = {spec.path: parse_scheme(split_plan(PLANS[name])[0]) for spec in self.traced.weights}
            of_matrices = all(scheme.per_tensor for scheme in choice.values())
            for equalized in (False, True) if of_matrices else (False,):
                wanted = itertools.product(self.options.methods, self.options.corrections)
                left = [(m, c) for m, c in wanted if (name, m, equalized, c) not in known]
                if left:
                    yield from (self.equalized(choice) if equalized else self).of_plan(name, choice, equalized, left)

    def of_plan(
        self, name: str, choice: dict[str, Scheme], equalized: bool, wanted: list[tuple[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """One a rounding algorithm and correction that is wanted, of the model as it is now."""
        chosen = all_rows(split_plan(PLANS[name])[1] or "", self.model, self.traced, self.sets["calibration"])
        model = with_activations(self.model, self.traced, chosen)
        for method, asked in itertools.groupby(wanted, key=lambda pair: pair[0]):
            candidates = Candidates(self.model.params, self.traced.weights, QUANTIZERS[method], self.stats)
            rounded = apply_plan(self.model.params, self.traced.weights, candidates.choose(choice))
            for _, correction in asked:
                norms, start = CORRECTIONS[correction], time.perf_counter()
                params = rounded if norms is None else self.corrected(rounded, chosen, norms)
                jax.block_until_ready(params)
                seconds = round(time.perf_counter() - start, 1)
                row = {"plan": name, "schemes": PLANS[name], "method": method, "correction": correction}
                yield row | {"equalized": equalized, "seconds": seconds} | self.quality(model, params)

    def corrected(
        self, params: dict[str, jax.Array], chosen: tuple[RoundedActivation, ...], norms: bool
    ) -> dict[str, jax.Array]:
        """The rounded parameters with vectors that make up for the rest."""
        options: dict[str, Any] = {"activations": chosen, "norms": norms, "batch_size": self.options.batch_size}
        return correct_biases(self.model, self.traced, params, self.shifts, self.sets["calibration"], **options)


def main(options: Options) -> None:
    """Measure, print, write after every row.

    Raises:
      MpqError: a plan is not among those there are, or the model or the images are wrong.
    """
    for name in options.plans:
        known("plan", name, PLANS)
    done = rows_in(options.out)
    comparison = Comparison(options)
    config = dataclasses.asdict(options) | {"data": options.data.name, "out": options.out.name}
    inputs = {"model": comparison.model.digest, **{name: data.digest for name, data in comparison.sets.items()}}
    record = RunRecord.collect(config | {"model": comparison.model.name}, seeds={}, inputs=inputs)
    before = comparison.quality(comparison.model, comparison.model.params)
    head = {"top1": before["top1"], "corrected": len(comparison.shifts), "record": record.to_json()}
    keep(comparison.rows(done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
