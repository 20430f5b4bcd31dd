r"""What rounded activations cost an image classifier, by how ranges are found, on its images and on shifted ones.

Run:     python -m experiments.image_activations --model DIR --data FILE.npz --shifted-data FILE.npz
             --shifted-test FILE.npz --out FILE.json
Expect:  ranges of the shifted images serve the others nearly as well; W8A8 within a few tenths of a point of top-1
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by setting and by the images that it was calibrated on, top-1 and KL to the original in nats
         per image on both test sets and on images to choose a setting by, with standard errors over images;
         `python -m analysis.activations` draws up the table

Weights are of 8 bits, rounded to nearest, or of 4 bits by GPTQ; all of them, and all that they read. `corrected` are
weights of 8 bits by GPTQ and then biases and norms, for what all rounding of the plan does to layers' outputs on
average, as `mpq run` has it (`mpq.quantize.correction`). Images to choose by are of the training part of `--data`,
behind those that ranges and statistics are of.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from experiments.activations import Rounded
from experiments.kept import keep, named_options, rows_in
from mpq.activations.apply import with_activations
from mpq.activations.plans import all_rows, split_plan
from mpq.calibrate import calibrate
from mpq.config import known
from mpq.data import row_digests, unseen
from mpq.data.sources import read_set
from mpq.equalize import find_shifts
from mpq.equalize.shifts import Shift
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import load
from mpq.quantize import QUANTIZERS, Candidates, apply_plan
from mpq.quantize.correction import correct_biases
from mpq.record import RunRecord
from mpq.types import LayerStats, Params

CORRECTED = ", corrected"
"""At the end of the name of a setting: GPTQ, and biases and norms corrected."""

PLANS: Mapping[str, str] = {
    "W8": "int8_channel",
    "W8A8 dynamic, by image": "int8_channel+int8_tensor",
    "W8A8 dynamic, by position": "int8_channel+int8_token",
    "W8A8 dynamic, FP8 by image": "fp8_e4m3_channel+fp8_e4m3_tensor",
    "W8A8 static, absmax": "int8_channel+int8_tensor_static_absmax",
    "W8A8 static, moving average": "int8_channel+int8_tensor_static_moving_average",
    "W8A8 static, percentile": "int8_channel+int8_tensor_static_percentile",
    "W8A8 static, MSE": "int8_channel+int8_tensor_static",
    "W8A8 static, entropy": "int8_channel+int8_tensor_static_entropy",
    "W8A8 static, MSE, zero point": "int8_channel+int8_tensor_static_asym",
    "W8, corrected": "int8_channel",
    "W8A8 dynamic, by image, corrected": "int8_channel+int8_tensor",
    "W8A8 dynamic, by position, corrected": "int8_channel+int8_token",
    "W8A8 static, percentile, corrected": "int8_channel+int8_tensor_static_percentile",
    "W8A8 static, MSE, corrected": "int8_channel+int8_tensor_static",
    "W8A8 static, entropy, corrected": "int8_channel+int8_tensor_static_entropy",
    "W8A8 static, MSE, zero point, corrected": "int8_channel+int8_tensor_static_asym",
    "W4": "int4_channel",
    "W4A8 dynamic, by image": "int4_channel+int8_tensor",
    "W4A8 static, absmax": "int4_channel+int8_tensor_static_absmax",
    "W4A8 static, percentile": "int4_channel+int8_tensor_static_percentile",
    "W4A8 static, MSE": "int4_channel+int8_tensor_static",
    "W4A8 static, entropy": "int4_channel+int8_tensor_static_entropy",
}
OWN, SHIFTED, SELECTION = "own", "shifted", "selection"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a folder of an image classifier.
      data: images and labels, `train_x`, `train_y`, `test_x`, `test_y`.
      shifted_data, shifted_test: images and labels that are shifted, to calibrate on and to judge by.
      out: JSON file.
      plans: of `PLANS`.
      calibration, selection, test, shifted: images to calibrate on, to choose a setting by, and of either test set.
      batch_size: images a pass.
    """

    model: str
    data: Path
    shifted_data: Path
    shifted_test: Path
    out: Path
    plans: tuple[str, ...] = tuple(PLANS)
    calibration: int = 512
    selection: int = 420
    test: int = 932
    shifted: int = 2048
    batch_size: int = 64


class Comparison:
    """The model, its images, and statistics that plans share."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, load(options.model)
        read = lambda path, which, limit: read_set(self.model, str(path), which, window=None, limit=limit)
        self.calibration: dict[str, Dataset] = {
            OWN: read(options.data, "calibration", options.calibration),
            SHIFTED: read(options.shifted_data, "calibration", options.calibration),
        }
        self.test: dict[str, Dataset] = {
            OWN: read(options.data, "test", options.test),
            SHIFTED: read(options.shifted_test, "test", options.shifted),
        }
        self.traced = self.model.trace(options.batch_size)

    @functools.cached_property
    def judged(self) -> dict[str, Reference]:
        """Both test sets, and the images to choose by."""
        options, seen = self.options, frozenset(row_digests(self.calibration[OWN]))
        limit = options.calibration + options.selection
        both = read_set(self.model, str(options.data), "calibration", window=None, limit=limit)
        sets = self.test | {SELECTION: unseen(both, seen, "statistics and ranges")}
        return {name: Reference(self.model, data, options.batch_size) for name, data in sets.items()}

    @functools.cached_property
    def stats(self) -> dict[str, LayerStats]:
        """Of the model's own images: what rounds the weights is one thing, whatever the ranges are of."""
        return dict(calibrate(self.traced, self.model.params, self.calibration[OWN], self.options.batch_size))

    def rounded(self, plan: str, calibrated_on: str = OWN) -> Rounded:
        """A plan's model with what is rounded of it."""
        weights, activations, _ = split_plan(PLANS[plan])
        chosen = all_rows(activations or "", self.model, self.traced, self.calibration[calibrated_on])
        method = QUANTIZERS["gptq" if weights.startswith("int4") or plan.endswith(CORRECTED) else "rtn"]
        candidates = Candidates(self.model.params, self.traced.weights, method, self.stats)
        choice = {spec.path: parse_scheme(weights) for spec in self.traced.weights}
        return Rounded(self.model, self.traced, chosen, candidates.choose(choice))

    @functools.cached_property
    def shifts(self) -> tuple[Shift, ...]:
        """What norms and biases can take up."""
        return tuple(find_shifts(self.model, self.traced, self.calibration[OWN]))

    def corrected(self, rounded: Rounded, params: Params) -> Params:
        """Biases and norms corrected on the model's own images."""
        data, size = self.calibration[OWN], self.options.batch_size
        more: dict[str, Any] = {"activations": rounded.chosen, "norms": True, "batch_size": size}
        return correct_biases(self.model, self.traced, params, self.shifts, data, **more)

    def quality(self, rounded: Rounded | None, correct: bool = False) -> dict[str, dict[str, float | None]]:
        """On all sets that are judged by, against the original; None: of the original itself."""
        model, params = self.model, dict(self.model.params)
        if rounded is not None:
            model = with_activations(rounded.model, rounded.traced, rounded.chosen)
            params = apply_plan(rounded.model.params, rounded.traced.weights, rounded.qtensors)
            params = dict(self.corrected(rounded, params)) if correct else params
        out: dict[str, dict[str, float | None]] = {}
        for name, reference in self.judged.items():
            result = score(model, params, reference.data, reference=reference, batch_size=0).summary()
            out[name] = {"top1": result.quality, "kl": result.kl, "kl_stderr": result.kl_stderr}
        return out

    def rows(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One a plan and the images of its ranges, those in `done` left out."""
        known = {(row["setting"], row["calibrated_on"]) for row in done}
        for name in self.options.plans:
            for on in (OWN, SHIFTED) if "static" in PLANS[name] else (None,):
                if (name, on) not in known:
                    row = {"setting": name, "plan": PLANS[name], "calibrated_on": on}
                    yield row | self.quality(self.rounded(name, on or OWN), name.endswith(CORRECTED))


def main(options: Options) -> None:
    """Measure, print, write after every row.

    Raises:
      MpqError: a plan is not among those there are, or the model or the images are wrong.
    """
    for name in options.plans:
        known("plan", name, PLANS)
    done = rows_in(options.out)
    comparison = Comparison(options)
    files = ("data", "shifted_data", "shifted_test", "out")
    config = named_options(options, files)
    sets = {"calibration": comparison.calibration, "test": {n: of.data for n, of in comparison.judged.items()}}
    inputs = {f"{which}_{name}": data.digest for which, of in sets.items() for name, data in of.items()}
    inputs |= {"model": comparison.model.digest}
    record = RunRecord.collect(config | {"model": comparison.model.name}, seeds={}, inputs=inputs)
    head = {"original": comparison.quality(None), "record": record.to_json()}
    keep(comparison.rows(done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
