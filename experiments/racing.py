r"""Racing against the whole table of measured KL on one model: what is spent, and what the plans lose.

Run:     python -m experiments.racing --model reference --data reference --out FILE
Expect:  for one budget, a regret of at most 0.01 with at most a third of the passes
Writes:  one JSON object: by budget, the share of the passes that the race took, its regret, and the regret of a table
         of the same share of the windows for every candidate

Regret is the loss, by the whole table, of the plan that the raced table gives, over the loss of the whole table's own
plan, minus 1. All three see the windows in the same order, first one of every document.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import tyro

from mpq.allocate import Problem, solve_frontier
from mpq.data.dataset import by_document, take
from mpq.data.sources import read_set
from mpq.files import canonical_json, write_json
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import MeasuredKL, MemoryStore
from mpq.sensitivity.racing import Race
from mpq.types import SensitivityTable


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      model: `reference` or a folder.
      data: `reference` or a file.
      out: JSON file, or None.
      schemes: columns of the tables.
      bpw: budgets, each raced for alone.
      windows: of the data; `window` tokens each, `batch_size` a pass.
    """

    model: str = "reference"
    data: str = "reference"
    out: Path | None = None
    schemes: tuple[str, ...] = ("int2_g64", "int3_g64", "int4_g64", "int8_channel")
    bpw: tuple[float, ...] = (2.75, 3.25, 4.0)
    windows: int = 48
    window: int = 64
    batch_size: int = 4


def main(options: Options) -> None:
    """Compare, print, write."""
    result = {"options": dataclasses.asdict(options), "budgets": compare(options)}
    print(canonical_json(result), end="")
    if options.out is not None:
        write_json(options.out, result)


def compare(options: Options) -> list[dict[str, Any]]:
    """Shares and regrets by budget."""
    model = load(options.model)
    data = by_document(read_set(model, options.data, "calibration", window=options.window, limit=options.windows))
    traced = model.trace(options.batch_size, options.window)
    schemes = tuple(map(parse_scheme, options.schemes))
    candidates = Candidates(model.params, traced.weights, RTN())
    arguments = (model, traced, schemes, candidates)
    store = MemoryStore()  # what one race measured, the next need not
    whole = lambda part: MeasuredKL()(*arguments, part, key=jax.random.key(0), batch_size=options.batch_size)
    full = Problem.from_table(whole(data))
    rows = []
    for bpw in options.bpw:
        bits = int(bpw * full.num_weights)
        table, raced = Race((bits,))(*arguments, data, batch_size=options.batch_size, store=store)
        share = raced.windows_run / raced.windows_of_all
        part = whole(take(data, int(share * len(data.inputs))))
        rows.append(
            {
                "bpw": bpw,
                "windows_run": raced.windows_run,
                "windows_of_all": raced.windows_of_all,
                "share": share,
                "regret": _regret(full, table, bits),
                "regret_of_equal_shares": _regret(full, part, bits),
            }
        )
    return rows


def _regret(full: Problem, table: SensitivityTable, bits: int) -> float:
    """Loss of a table's plan by the whole table, over that of the whole table's own plan, minus 1."""
    choice = solve_frontier(Problem.from_table(table)).choice_within(bits)
    return float(full.parts(choice).sum() / solve_frontier(full).lower_bound(bits)) - 1


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
