r"""What each rounding algorithm leaves of a model: KL, perplexity and layer losses under uniform schemes.

Run:     python -m experiments.rounding --model DIR --data TEXT --test TEXT --out experiments/results/rounding/NAME.json
Expect:  KL falls from rtn over hqq and rtn_mse to gptq; a smaller layer loss mostly means a smaller KL, and not always
Resume:  type the same command again: rows that the file holds are not computed again
Writes:  one JSON object: by algorithm, scheme and part of the model, bits per weight, KL to the original and excess
         loss, nats per token; the layer loss, summed over the weights; and the seconds that the algorithm took, with
         compilation, 0 where the other part of the model had it rounded already

`blocks` are the weights whose path matches `--only`, `all` every one. `awq` moves scales between layers before weights
are rounded to nearest, `awq_absmax` too, with scales that need no data, and `awq_gptq` before GPTQ. `qep` is GPTQ in
the order of execution, each weight making up for those before it, `qep_awq` after AWQ. In `gptq_guided` and
`qep_guided` tokens count by how much the end loss depends on them (`mpq/guide.py`), with the exponent 1 where the name
ends in 1. What ends in `_rotated` rounds the rotated model; a tied one, whose head then has a table of its own, in its
blocks alone. Text, windows and sizes are those of `experiments.distillation`.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.distillation import Comparison
from experiments.distillation import Options as Text
from experiments.kept import keep, named_options, rows_in
from mpq.config import known
from mpq.formats import parse_scheme
from mpq.guide import Guide
from mpq.quantize import GPTQ, QUANTIZERS, RTN, Candidates
from mpq.quantize.quantizer import Quantizer
from mpq.quantize.signround import SignRound
from mpq.record import RunRecord
from mpq.types import QTensor

ALGORITHMS: Mapping[str, Quantizer] = {
    **QUANTIZERS,
    "rtn_mse": RTN("mse"),
    "signround_from_rtn": SignRound(start=RTN("mse")),
    "awq": RTN("mse"),
    "awq_absmax": RTN(),
    "awq_gptq": GPTQ(),
    "qep": GPTQ(),
    "qep_awq": GPTQ(),
    "gptq_guided": GPTQ(),
    "qep_guided": GPTQ(),
    "gptq_guided_1": GPTQ(),
    "qep_guided_1": GPTQ(),
    "rtn_rotated": RTN(),
    "rtn_mse_rotated": RTN("mse"),
    "gptq_rotated": GPTQ(),
}
EQUALIZED = ("awq", "awq_absmax", "awq_gptq", "qep_awq")
"""Of `ALGORITHMS`, those that are given weights whose scales were moved by AWQ."""

GUIDED = {"gptq_guided": 0.5, "qep_guided": 0.5, "gptq_guided_1": 1.0, "qep_guided_1": 1.0}
"""Of `ALGORITHMS`, those that are given grams of tokens weighted by the end loss, and the exponent of the weights."""

PROPAGATED = ("qep", "qep_awq", "qep_guided", "qep_guided_1")
"""Of `ALGORITHMS`, those that round in order, each weight making up for those before."""

ROTATED = ("rtn_rotated", "rtn_mse_rotated", "gptq_rotated")
"""Of `ALGORITHMS`, those that are given the weights of the rotated model."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a folder, or `reference`.
      data, test: calibration and held-out text.
      out: JSON file.
      only: regular expression of the weights that `blocks` are.
      schemes: for all weights alike.
      algorithms: of `ALGORITHMS`.
      windows: of either text, `window` tokens each, `batch_size` a pass.
      seed: of the rotations and of the guide's signs.
    """

    model: str
    data: Path
    test: Path
    out: Path
    only: str = "layers"
    schemes: tuple[str, ...] = ("int2_g32", "int3_g32", "int4_g32", "int2_g32_zp", "int3_g32_zp", "int4_g32_zp")
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    windows: int = 64
    window: int = 256
    batch_size: int = 8
    seed: int = 0


def comparisons(options: Options) -> dict[str, Comparison]:
    """Part of the model -> what measures it."""
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name in Text.__annotations__}
    blocks = Comparison(Text(**shared))
    return {"blocks": blocks, "all": blocks.of_all_weights()}


def rotated(parts: Mapping[str, Comparison], seed: int) -> dict[str, Comparison]:
    """The same of the rotated model; without `all` if that has more weights."""
    blocks = parts["blocks"].rotated(seed)
    more = len(blocks.traced.weights) > len(parts["blocks"].traced.weights)
    return {"blocks": blocks} | ({} if more else {"all": blocks.of_all_weights()})


def guided(parts: Mapping[str, Comparison], guide: Guide) -> dict[str, Comparison]:
    """The same where rounding goes by grams that the end loss weights."""
    blocks = parts["blocks"].guided(guide)
    return {"blocks": blocks, "all": blocks.of_all_weights()}


def layer_loss(comparison: Comparison, qtensors: Mapping[str, QTensor]) -> float:
    """Sum of tr(eT gram e) over the weights that are multiplied."""
    total, stats = 0.0, comparison.stats
    for spec in comparison.weights:
        if spec.path in stats:
            error = np.asarray(spec.read(comparison.model.params), np.float64)
            error -= np.asarray(qtensors[spec.path].dequantize(), np.float64)
            total += float(np.sum(error * (stats[spec.path].gram.astype(np.float64) @ error)))
    return total


def rows(options: Options, parts: Mapping[str, Comparison], done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One an algorithm, scheme and part, those in `done` left out."""
    known = {(row["algorithm"], row["scheme"], row["part"]) for row in done}
    turned = functools.cache(lambda: rotated(parts, options.seed))
    led = functools.cache(lambda exponent: guided(parts, Guide(exponent, seed=options.seed)))
    for algorithm in options.algorithms:
        rounded = lambda c, name=algorithm: Candidates(c.model.params, c.traced.weights, ALGORITHMS[name], c.stats)
        of = turned() if algorithm in ROTATED else led(GUIDED[algorithm]) if algorithm in GUIDED else parts
        candidates = rounded(of["blocks"])
        for scheme, part in itertools.product(options.schemes, of):
            if (algorithm, scheme, part) in known:
                continue
            measured, start = of[part], time.perf_counter()
            choice = {w.path: parse_scheme(scheme) for w in measured.weights}
            if algorithm in EQUALIZED:
                measured = measured.equalized(choice)
                candidates = rounded(measured)
            ordered = algorithm in PROPAGATED
            made = measured.propagated(candidates, choice) if ordered else candidates.choose(choice)
            qtensors = jax.block_until_ready(made)
            seconds = time.perf_counter() - start
            row = measured.row(qtensors)
            del row["schemes"]
            named = {"algorithm": algorithm, "scheme": scheme, "part": part, **row}
            plain = parts[part] if algorithm in GUIDED else measured  # a loss that compares needs the same grams
            yield named | {"layer_loss": layer_loss(plain, qtensors), "seconds": round(seconds, 2)}


def main(options: Options) -> None:
    """Measure, print, write after every row.

    Raises:
      MpqError: an algorithm is not among those there are, or the model or a text is wrong.
    """
    for name in options.algorithms:
        known("algorithm", name, ALGORITHMS)
    parts = comparisons(options)
    done = rows_in(options.out)
    first = parts["blocks"]
    inputs = {"data": first.calibration.digest, "model": first.model.digest, "test": first.reference.data.digest}
    config = named_options(options, ("data", "test", "out"))
    record = RunRecord.collect(config | {"model": first.model.name}, seeds={"seed": options.seed}, inputs=inputs)
    head = {
        "algorithms": {name: repr(ALGORITHMS[name]) for name in options.algorithms},
        "perplexity": first.original.summary().quality,
        "record": record.to_json(),
    }
    keep(rows(options, parts, done), options.out, head, done)


if __name__ == "__main__":
    main(tyro.cli(Options))
