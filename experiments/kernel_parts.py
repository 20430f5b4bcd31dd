"""Where the time of Hopper's matmuls goes: every kernel of a call, for every config that is worth measuring.

    python -m experiments.kernel_parts --out FILE [--table kernels_pallas/tuned/nvidia-h200.json] [--commit SHA]

For a card that is lent for minutes: `kernels_pallas.bench` has all backends and says what is fastest, this says why.
Weights and copies are as there. With `--table` the entries of these cases get the fastest config and its time.
"""

import argparse
import dataclasses
import functools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import BACKENDS, quantized_matmul
from kernels_pallas.bench import Options, environment, product, rotating
from kernels_pallas.cases import DECODE, Case, fill
from kernels_pallas.compat import kernel_times
from kernels_pallas.matmul import describe
from kernels_pallas.tables import Entry, Table, as_json, read_table

DENSE = "dense"


def calls(case: Case, megabytes: int) -> dict[str, Any]:
    """A config, as text, to a function of nothing, and the dense dot; each takes copies of a weight in turn."""
    x, packed = fill(case, 0)
    weight, options = (
        jax.random.normal(jax.random.key(1), (*case.batch, case.k, case.n), x.dtype),
        Options(1, megabytes),
    )
    arguments = {"activation_bits": case.activation_bits, "backend": "hopper", "out_dtype": jnp.float32}
    found = {}
    for config in BACKENDS["hopper"].worth_measuring(describe(x, packed, case.activation_bits)):
        run = functools.partial(quantized_matmul, config=config, **arguments)
        found[str(config)] = rotating(run, x, packed, packed.size_bits // 8, options)
    return {**found, DENSE: rotating(product, x, weight, weight.nbytes, options)}


def measure(case: Case, repeats: int, megabytes: int) -> list[dict[str, Any]]:
    """A row a config: the median of every kernel of a call, in their order, and their sum, in microseconds."""
    runs = calls(case, megabytes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: jax.block_until_ready(run()), runs.values()))
    rows = []
    for config, run in runs.items():
        kernels = {}
        for i, same in enumerate(zip(*kernel_times(run, repeats), strict=True)):
            kernels[f"{i}:{_short(same[0][0])}"] = round(float(np.median([micro for _, micro in same])), 1)
        rows.append({"case": str(case), "config": config, "sum": round(sum(kernels.values()), 1), "kernels": kernels})
    return rows


def _short(name: str) -> str:
    return re.sub(r"_mosaic_gpu_ker.*", "", name)[:26]


def updated(table: Table, rows: list[dict[str, Any]]) -> Table:
    """The table, in which Hopper's entries of these cases have the fastest config and its time."""
    cases = {str(case): case for case in DECODE}
    best: dict[Any, tuple[float, tuple[int, ...]]] = {}
    for row in rows:
        if row["config"] != DENSE:
            case = cases[row["case"]]
            x, packed = jax.eval_shape(functools.partial(fill, case, 0))
            problem = describe(x, packed, case.activation_bits)
            found = row["sum"], tuple(json.loads(row["config"].replace("(", "[").replace(")", "]")))
            best[problem] = min(best.get(problem, found), found)
    entries = [e for e in table.entries if e.backend != "hopper" or e.problem not in best]
    new = [Entry(problem, "hopper", config, "measured", micro) for problem, (micro, config) in best.items()]
    return dataclasses.replace(table, entries=(*entries, *new))


def main() -> None:
    """Measure, and write after every case."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kernel_parts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--table", type=Path, help="tuned table to bring up to date")
    parser.add_argument("--only", default="-(16|64|256|2048)x(8192x|4096x|8x)", help="regular expression of cases")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--budget-s", type=float, default=200, help="begins no case after so many seconds")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    options = parser.parse_args()
    try:
        only = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is no regular expression ({error})")
    start, rows = time.perf_counter(), []
    for case in DECODE:
        if not only.search(str(case)) or time.perf_counter() - start > options.budget_s:
            continue
        rows += measure(case, options.repeats, options.megabytes)
        body = {"environment": environment(), "commit": options.commit, "rows": rows}
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows[-2]), flush=True)
    if options.table is not None:
        table = updated(read_table(options.table.read_text(encoding="utf-8")), rows)
        options.table.write_text(json.dumps(as_json(table), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
