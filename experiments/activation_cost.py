r"""What rounding activations costs at run time: a model on packed weights, `mpq.packed`, by how inputs are rounded.

Run:     python -m experiments.activation_cost --model reference --data TEXT --out FILE
         (or a classifier's folder and an .npz file of images)
Expect:  a dynamic scale costs little more than a static range; products of integers are faster than of floats
Writes:  one JSON object: by setting, the median of seconds that a batch takes, and its quartiles; of one run, settings
         in turns, so that ratios mean something on a machine that does other things too

The original in float32 is compiled as it is. Weights of 8 bits are packed for where JAX runs; each setting is one
compiled program.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import activations, image_activations
from experiments.activations import SETTINGS, Rounded
from mpq.files import canonical_json, write_json
from mpq.inputs import Tokens
from mpq.models import Model, load
from mpq.packed import evaluate_packed, pack_weights
from mpq.record import RunRecord
from mpq.types import MpqError

FLOAT = "original, float32"
TEXTS = (
    "W8",
    "W8A8 dynamic",
    "W8A8 dynamic, groups",
    "W8A8 dynamic, outliers apart",
    "W8A8 dynamic, online",
    "W8A8 static, absmax",
    "W8A8 static, absmax, online",
)
"""Of `experiments.activations`."""

IMAGES = ("W8", "W8A8 dynamic, by image", "W8A8 dynamic, by position", "W8A8 static, absmax")
"""Of `experiments.image_activations`."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed.

    Attributes:
      model: a folder, or `reference`.
      data: to calibrate on and to time: text, or images.
      out: JSON file.
      settings: of `TEXTS`, or of `IMAGES`; none: all of them.
      batch_size, window: windows or images a batch, and tokens a window.
      repeats: of every setting.
    """

    model: str
    data: Path
    out: Path
    settings: tuple[str, ...] = ()
    batch_size: int = 8
    window: int = 256
    repeats: int = 15


class Prepared(NamedTuple):
    """A model, what makes a setting of it, a batch, the settings there are, and digests of what was read."""

    model: Model
    made: Callable[[str], Rounded]
    batch: np.ndarray
    names: tuple[str, ...]
    inputs: dict[str, str]


def prepare(options: Options) -> Prepared:
    """Read the model and the data."""
    model = load(options.model)
    paths: dict[str, Any] = {"data": options.data, "out": options.out, "batch_size": options.batch_size}
    if isinstance(model.inputs, Tokens):
        paths |= {"test": options.data, "shifted": options.data, "windows": 4 * options.batch_size}
        texts = activations.Options(model=options.model, window=options.window, **paths)
        comparison = activations.Comparison(texts)
        data, names = comparison.calibration, TEXTS
        made: Callable[[str], Rounded] = lambda name: comparison.rounded(SETTINGS[name])
    else:
        paths |= {"shifted_data": options.data, "shifted_test": options.data, "test": 1, "shifted": 1}
        pictures = image_activations.Comparison(image_activations.Options(options.model, **paths))
        data, names, made = pictures.calibration[image_activations.OWN], IMAGES, pictures.rounded
    digests = {"model": model.digest, "data": data.digest}
    return Prepared(model, made, data.inputs[: options.batch_size], names, digests)


def runners(
    model: Model, made: Callable[[str], Rounded], batch: np.ndarray, settings: tuple[str, ...]
) -> dict[str, Callable[[], Any]]:
    """Name -> what runs the batch once."""
    original = jax.jit(model.apply)
    runs: dict[str, Callable[[], Any]] = {FLOAT: functools.partial(original, model.params, batch)}
    for name in settings:
        rounded = made(name)
        packed = pack_weights(rounded.traced.weights, rounded.qtensors)
        whole = {w.param for w in rounded.traced.weights if w.path in packed}
        rest = {path: value for path, value in rounded.model.params.items() if path not in whole}
        run = jax.jit(functools.partial(evaluate_packed, rounded.traced.on(batch.shape), activations=rounded.chosen))
        runs[name] = functools.partial(run, rest, packed, batch)
    return runs


def timed(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, in turns; the first, which compiles, does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def rows(times: Mapping[str, list[float]]) -> Iterator[dict[str, Any]]:
    """One a setting."""
    for name, seconds in times.items():
        low, median, high = (float(q) for q in np.percentile(seconds, [25, 50, 75]))
        yield {"setting": name, "seconds": median, "quartiles": [low, high], "repeats": len(seconds)}


def main(options: Options) -> None:
    """Time, print, write.

    Raises:
      MpqError: a setting is not among those there are, or the model or the data are wrong.
    """
    model, made, batch, names, inputs = prepare(options)
    if unknown := [name for name in options.settings if name not in names]:
        raise MpqError(f"unknown setting {unknown[0]!r}: the valid ones are {', '.join(names)}")
    config = dataclasses.asdict(options) | {"data": options.data.name, "out": options.out.name, "model": model.name}
    record = RunRecord.collect(config, seeds={}, inputs=inputs)
    found = list(rows(timed(runners(model, made, batch, options.settings or names), options.repeats)))
    print(canonical_json(found), end="", flush=True)
    write_json(options.out, {"inputs": list(batch.shape), "record": record.to_json(), "rows": found})


if __name__ == "__main__":
    main(tyro.cli(Options))
