"""How fast weights are rounded to block types of ggml, and their bytes laid out.

Run:     python -m experiments.bench_encode --out FILE
Expect:  at least 5 million weights a second for every K-quant on two cores
Writes:  one JSON object: by type, millions of weights a second, from the median of `repeats`, of three steps that were
compiled before: `absmax` rounds under scales of the largest values, `search` under those of the least squared error,
`pack` lays out the bytes of a file
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from mpq.files import write_json
from mpq.formats import parse_scheme
from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf.layouts import pack
from mpq.quantize import RTN
from mpq.record import RunRecord


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: JSON file, or None.
      types: of ggml.
      k, n: shape of the weight.
      repeats: of every timing.
      seed: of the random weight.
    """

    out: Path | None = None
    types: tuple[str, ...] = tuple(GGML_SCHEMES)
    k: int = 2048
    n: int = 2048
    repeats: int = 5
    seed: int = 0


def main(options: Options) -> None:
    """Measure, print, write."""
    body = {
        "weights": options.k * options.n,
        "millions_per_second": {name: measure(name, options) for name in options.types},
        "record": RunRecord.collect(
            {"types": options.types, "shape": (options.k, options.n), "repeats": options.repeats},
            seeds={"weight": options.seed},
            inputs={},
            command="python -m experiments.bench_encode",
        ).to_json(),
    }
    print(json.dumps(body["millions_per_second"], indent=1))
    if options.out is not None:
        write_json(options.out, body)


def measure(name: str, options: Options) -> dict[str, float]:
    """Millions of weights a second of the three steps."""
    scheme = parse_scheme(name)
    rng = np.random.default_rng(options.seed)
    w = jax.numpy.asarray(rng.normal(size=(1, options.k, options.n)), np.float32)
    made = RTN()(w, scheme)
    parts = {part: np.asarray(getattr(made, part))[0] for part in scheme.part_bits(options.k, options.n)}
    rate = lambda run: round(w.size / 1e6 / median_seconds(run, options.repeats), 2)
    return {
        "absmax": rate(lambda: jax.block_until_ready(RTN()(w, scheme).qvalue)),
        "search": rate(lambda: jax.block_until_ready(RTN("mse")(w, scheme).qvalue)),
        "pack": rate(lambda: pack(parts, scheme)),
    }


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of a call that was made once before."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(tyro.cli(Options))
