r"""What a trellis leaves of normal values, beside the best levels and the bound, and which multiplier is best for it.

Run:     python -m experiments.trellis --out experiments/results/codebooks/normal.json
Expect:  the multipliers of `mpq.formats.trellis` among the best, and errors between the bound and those of levels
Writes:  one JSON object: by width the mean squared error of unit normal values, in spans as weights are cut into:
         `own` of the format, `best` of all multipliers, `levels` of the best grid of as many levels (Lloyd 1982,
         Max 1960), and `bound`, 4^-bits, which no code of that rate is below

Multipliers are odd, or states would share levels; one and its negative give mirror images. All are tried on `few` rows,
those that come first there on all rows, with the gain and the start of the format.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import norm

from mpq.files import write_json
from mpq.formats.trellis import CHOICES, SPAN, STATE_BITS, Choice, by_state, viterbi
from mpq.progress import track
from mpq.record import RunRecord


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tried.

    Attributes:
      out: JSON file.
      rows: of `SPAN` values each.
      few: of these, for the first round.
      finalists: multipliers of the second round.
      seed: of the values.
    """

    out: Path
    rows: int = 2048
    few: int = 96
    finalists: int = 8
    seed: int = 0


@functools.partial(jax.jit, static_argnames=("start", "bits"))
def mean_error(x: jax.Array, level: jax.Array, start: int, bits: int) -> jax.Array:
    """Mean squared error of `x[rows, SPAN]`, with `level[S]` of each state."""
    cost = jax.lax.map(lambda row: viterbi(row, jnp.ones_like(row), level, start, bits)[1], x, batch_size=64)
    return cost.mean() / x.shape[-1]


def best_levels(count: int, turns: int = 20000) -> float:
    """Least mean squared error of so many levels for a unit normal distribution, by Lloyd's iteration."""
    level = norm.ppf((np.arange(count) + 0.5) / count)
    mass = np.full(count, 1 / count)
    for _ in range(turns):
        edge = np.concatenate([[-np.inf], (level[1:] + level[:-1]) / 2, [np.inf]])
        mass, density = np.diff(norm.cdf(edge)), norm.pdf(edge)
        level = (density[:-1] - density[1:]) / mass
    return float(1 - np.sum(mass * level**2))  # levels are the means of their values


def widths(options: Options) -> Iterator[dict[str, Any]]:
    """A row a width."""
    x = jax.random.normal(jax.random.key(options.seed), (options.rows, SPAN))
    for bits, own in CHOICES.items():

        def error(multiplier: int, rows: jax.Array, own: Choice = own, bits: int = bits) -> float:
            level = by_state(dataclasses.replace(own, multiplier=multiplier))
            return float(mean_error(rows, jnp.asarray(level), own.start, bits))

        every = track(range(1, 1 << (STATE_BITS - 1), 2), f"{bits} bits", 1 << (STATE_BITS - 2))
        first = sorted(every, key=lambda multiplier: error(multiplier, x[: options.few]))
        least = {multiplier: error(multiplier, x) for multiplier in (*first[: options.finalists], own.multiplier)}
        best = min(least, key=least.__getitem__)
        yield {
            "bits": bits,
            **dataclasses.asdict(own),
            "own": least[own.multiplier],
            "best_multiplier": best,
            "best": least[best],
            "levels": best_levels(2**bits),
            "bound": 4.0**-bits,
        }


def main(options: Options) -> None:
    """Try, print, write."""
    rows = []
    for row in widths(options):
        print(row, flush=True)
        rows.append(row)
    config = dataclasses.asdict(options) | {"out": options.out.name}
    record = RunRecord.collect(config, seeds={"values": options.seed}, inputs={})
    write_json(options.out, {"state_bits": STATE_BITS, "widths": rows, "record": record.to_json()})


if __name__ == "__main__":
    main(tyro.cli(Options))
