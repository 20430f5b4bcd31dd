"""Time of every backend that runs here, beside a dense float32 dot, as a table and as JSON.

    python -m kernels_pallas.bench --out FILE [--only w4a16] [--repeats 20] [--megabytes 128]

Random data of `cases`. Every function of a case takes its turn in every repeat, so that other work on the machine hits
all alike. Weights are copied until they fill `--megabytes`, and a call takes the next copy, so that none is found in a
cache. The ceilings, bandwidth and dots of large squares, are measured in the same run; a roofline is what they allow
for the bytes and operations of a case. Errors are against float64, relative to the largest output, with activations
rounded as the contract says.
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import compat
from kernels_pallas.backend import Problem, dot_type
from kernels_pallas.cases import CONFORMANCE, SPEED, Case, draw
from kernels_pallas.devices import Device
from kernels_pallas.dispatch import BACKENDS
from kernels_pallas.matmul import describe, quantized_matmul
from kernels_pallas.packed import Packed, dequantize
from kernels_pallas.reference import quantize_tokens

DENSE = "dense_float32"
COLUMNS = ("case", "backend", "p50", "p10", "p90", "gb_per_s", "speedup", "roofline_percent", "max_error")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured: turns of every function, bytes that copies of a weight fill, and a part of the cases' names."""

    repeats: int = 20
    megabytes: int = 128
    only: str = ""


def times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Microseconds of every call of functions that return arrays, compiled before; they take turns."""
    for run in runs.values():
        jax.block_until_ready(run())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(1e6 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in taken.items()}


def ceilings(repeats: int) -> Device:
    """What this machine reaches: reading 256 MB, and dots of squares of 1024, the best of the repeats."""
    side, words = 1024, 2**26
    key = jax.random.key(0)
    dot = lambda a, b, out: lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)
    square = jax.random.normal(key, (side, side))
    bytes_ = jnp.clip(jnp.round(40 * square), -127, 127).astype(jnp.int8)
    dots = {name: jax.jit(functools.partial(dot, out=out)) for name, out in (("float32", "float32"), ("int8", "int32"))}
    add = jax.jit(jnp.sum)
    array = jnp.ones((words,), jnp.float32)
    taken = times(
        {
            "read": lambda: add(array),
            "float32": lambda: dots["float32"](square, square),
            "int8": lambda: dots["int8"](bytes_, bytes_),
        },
        repeats,
    )
    rate = lambda name, amount: amount / (1e-6 * float(np.min(taken[name])))
    macs = {name: rate(name, side**3) for name in ("float32", "int8")}
    return Device(rate("read", 4 * words), macs, math.inf, 0)


def oracle(x: jax.Array, packed: Packed, activation_bits: int | None) -> np.ndarray:
    """The result in float64."""
    w = np.asarray(jax.jit(dequantize)(packed), np.float64)
    if activation_bits is None:
        return np.asarray(x, np.float64) @ w
    flat = x.reshape(-1, x.shape[-1])
    codes, scale = (np.asarray(part, np.float64) for part in jax.jit(quantize_tokens)(flat))
    return (codes * scale).reshape(x.shape) @ w


def measure(case: Case, options: Options, limits: Device) -> list[dict[str, Any]]:
    """One row a backend that runs here, the dense dot first."""
    here = compat.platform()
    names = [name for name, backend in BACKENDS.items() if not backend.platforms or here in backend.platforms]
    weights, runs, rows = {}, {}, []
    for name in names:
        layout = (BACKENDS[name].layouts or ("plain",))[0]
        try:
            x, weights[name], _ = draw(case, layout, 0, exact=False)
        except ValueError:
            continue  # the layout does not hold this format
        arguments = {"activation_bits": case.activation_bits, "backend": name, "out_dtype": jnp.float32}
        run = jax.jit(functools.partial(quantized_matmul, **arguments))
        runs[name] = _rotating(run, x, weights[name], weights[name].size_bits // 8, options.megabytes)
    x, plain = draw(case, "plain", 0, exact=False)[:2]
    dense = jax.jit(dequantize)(plain)
    multiply = jax.jit(lambda x, w: jnp.matmul(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST))
    runs = {DENSE: _rotating(multiply, x, dense, dense.nbytes, options.megabytes), **runs}
    want = oracle(x, plain, case.activation_bits)
    taken = times(runs, options.repeats)
    problem = describe(x, plain, case.activation_bits)
    for name, micro in taken.items():
        got = np.asarray(runs[name](), np.float64)
        error = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
        rows.append(_row(case, name, problem, micro, taken[DENSE], limits, error))
    return rows


def _rotating(run: Callable[..., Any], x: jax.Array, weight: Any, size: int, megabytes: int) -> Callable[[], Any]:
    """Calls with the next of enough copies of a weight to fill so many megabytes, at most 64."""
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(min(64, max(1, -(-megabytes * 10**6 // max(size, 1)))))]
    turn = iter(range(10**9))
    return lambda: run(x, copies[next(turn) % len(copies)])


def _row(
    case: Case, name: str, problem: Problem, micro: np.ndarray, dense: np.ndarray, limits: Device, error: float
) -> dict[str, Any]:
    p10, p50, p90 = (float(np.percentile(micro, q)) for q in (10, 50, 90))
    quantized = name != DENSE
    moved = problem.num_bytes if quantized else problem.num_bytes + 4 * problem.batch * problem.k * problem.n
    least = 1e6 * limits.seconds(moved, problem.macs, dot_type(problem) if quantized else "float32")
    return {
        "case": str(case),
        "backend": name,
        "p50": round(p50, 1),
        "p10": round(p10, 1),
        "p90": round(p90, 1),
        "gb_per_s": round(moved / p50 / 1e3, 3),
        # The median of ratios within a repeat, which other work on the machine disturbs less than a ratio of medians.
        "speedup": round(float(np.median(dense / micro)), 3),
        "roofline_percent": round(100 * least / p50, 2),
        "max_error": float(f"{error:.2e}"),
    }


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text; microseconds, and speedups over the dense dot."""
    cells = [COLUMNS, *[tuple(str(row[column]) for column in COLUMNS) for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    for field in dataclasses.fields(Options):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    options = Options(**given)
    limits = ceilings(options.repeats)
    chosen = [case for case in (*CONFORMANCE, *SPEED) if options.only in str(case)]
    rows = [row for case in chosen for row in measure(case, options, limits)]
    print(show(rows))
    body = {
        "environment": environment(),
        "options": dataclasses.asdict(options),
        "ceilings": {"bytes_per_s": limits.bandwidth, "macs_per_s": dict(limits.macs)},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
