"""Time of every backend that runs here, beside a dense dot, as a table and as JSON.

    mpq bench kernels [--out FILE] [--only w4a16] [--tune] [--repeats 20] [--megabytes 128] [--chain 1] [--budget-s 0]

The dense dot is of float32 on a CPU, elsewhere of the activations' type. `python -m kernels_pallas.bench` has the same
options and needs this package alone.

Random data of `cases`; times are those of `timers`. Where a kernel has several configs, the fastest is its row. Weights
are copied until they fill `--megabytes`, and a call takes the next copy, so that none is found in a cache. On a TPU,
where the launch of a call can take longer than the matmul, `--chain 8` compiles that many into one function and divides
its time. `--budget-s 420` begins no case after so many seconds; what is measured is written after each. The ceilings,
bandwidth and dots of large squares, are measured in the same run; a roofline is what they allow for the bytes and
operations of a case. Errors are against float64, relative to the largest output, with activations rounded as the
contract says. A tuned table (`tables`) has an entry for every backend and case.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import compat
from kernels_pallas.backend import Config, Problem, dot_type
from kernels_pallas.cases import CONFORMANCE, DECODE, SPEED, Case, draw, fill
from kernels_pallas.devices import Device
from kernels_pallas.dispatch import BACKENDS, choose, own_layout, refusal
from kernels_pallas.errors import KernelError
from kernels_pallas.layouts import LAYOUTS
from kernels_pallas.matmul import describe, quantized_matmul, tuned
from kernels_pallas.native_build import library
from kernels_pallas.packed import Packed, dequantize, relayout
from kernels_pallas.reference import quantize_tokens
from kernels_pallas.tables import Entry, Table, as_json, new_table
from kernels_pallas.timers import times

COLUMNS = {
    "format": "format",
    "shape": "shape",
    "m": "m",
    "backend": "backend",
    "auto": "auto",
    "p50": "us",
    "p10": "p10",
    "p90": "p90",
    "gb_per_s": "GB/s",
    "speedup": "x dense",
    "roofline_percent": "% roofline",
    "max_error": "max error",
}
"""Field of a row -> its heading in the table."""


CHECKED = 2**24
"""Elements of the largest weight whose product is also computed in float64."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      repeats: turns of every function.
      megabytes: that copies of a weight fill.
      only: regular expression; cases in whose names it is found.
      chain: matmuls of one call, each with another copy of the weight.
      budget_s: seconds after which no other case begins; 0: all of them.
      commit: of the code, for the record.
    """

    repeats: int = 20
    megabytes: int = 128
    only: str = ""
    chain: int = 1
    budget_s: int = 0
    commit: str = ""


def ceilings(repeats: int) -> Device:
    """What this machine reaches: reading memory, and dots of large squares, the best of the repeats."""
    side, words = (1024, 2**26) if compat.platform() == "cpu" else (8192, 2**30)
    square = jax.random.normal(jax.random.key(0), (side, side))
    dot = lambda a, out: lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=out)
    operands = {
        "float32": (square, "float32"),
        "bfloat16": (square.astype(jnp.bfloat16), "float32"),
        "int8": (jnp.clip(jnp.round(40 * square), -127, 127).astype(jnp.int8), "int32"),
    }
    dots = {name: functools.partial(jax.jit(dot, static_argnums=1), *pair) for name, pair in operands.items()}
    add, array = jax.jit(jnp.sum), jnp.ones((words,), jnp.float32)
    taken = times({"read": lambda: add(array), **dots}, repeats)
    rate = lambda name, amount: amount / (1e-6 * float(np.min(taken[name])))
    return Device(rate("read", 4 * words), {name: rate(name, side**3) for name in dots}, math.inf, 0)


def oracle(x: jax.Array, packed: Packed, activation_bits: int | None) -> np.ndarray:
    """The result in float64."""
    w = np.asarray(jax.jit(dequantize)(packed), np.float64)
    if activation_bits is None:
        return np.asarray(x, np.float64) @ w
    flat = x.reshape(-1, x.shape[-1])
    codes, scale = (np.asarray(part, np.float64) for part in jax.jit(quantize_tokens)(flat))
    return (codes * scale).reshape(x.shape) @ w


def measure(case: Case, options: Options, limits: Device) -> tuple[list[dict[str, Any]], list[Entry]]:
    """One row a backend that runs here, with its fastest config, the dense dot first; and the entries of a table."""
    here = compat.platform()
    large = here == "cuda" and case in DECODE
    x, packed, weight = _data(case, here, large)
    problem = describe(x, packed, case.activation_bits)
    runs: dict[tuple[str, Config], Callable[[], Any]] = {}
    for name, backend in BACKENDS.items():
        if refusal(backend, problem, here, interpret=False) is None and _worth(name, problem):
            for config in backend.worth_measuring(problem) if here == "cuda" else (tuned(name, problem, here),):
                arguments = {"activation_bits": case.activation_bits, "backend": name, "out_dtype": jnp.float32}
                run = functools.partial(quantized_matmul, **arguments, config=config)
                runs[name, config] = rotating(run, x, packed, packed.size_bits // 8, options)
    label = f"dense_{weight.dtype}"
    runs = {(label, ()): rotating(product, x, weight, weight.nbytes, options), **runs}
    taken = {key: micro / options.chain for key, micro in times(runs, options.repeats).items()}
    fastest: dict[str, tuple[str, Config]] = {}
    for key in taken:
        fastest[key[0]] = min(key, fastest.get(key[0], key), key=lambda key: float(np.median(taken[key])))
    want = oracle(x, packed, case.activation_bits) if case.k * case.n <= CHECKED else None
    chosen = choose(problem, here)[0]
    rows = []
    for name, key in fastest.items():
        error = None
        if want is not None and not (name == label and large):
            error = float(np.max(np.abs(np.asarray(runs[key]()[0], np.float64) - want)) / np.max(np.abs(want)))
        row = _row(case, name, problem, taken[key], taken[label, ()], limits, error)
        rows.append({**row, "config": list(key[1]), "auto": name == chosen})
    entries = [
        Entry(problem, name, key[1], "measured", rows[i]["p50"]) for i, (name, key) in enumerate(fastest.items())
    ]
    return rows, [entry for entry in entries if entry.backend in BACKENDS]


def _data(case: Case, here: str, large: bool) -> tuple[jax.Array, Packed, jax.Array]:
    """Activations, the packed weight, and the dense one. Large ones for a GPU are made there, and are not the same."""
    if large:
        x, packed = fill(case, 0)
        return x, packed, jax.random.normal(jax.random.key(1), (*case.batch, case.k, case.n), x.dtype)
    x, plain = draw(case, "plain", 0, exact=False)[:2]
    dtype = jnp.dtype("float32") if here == "cpu" else x.dtype
    return x, _for_this_device(plain, here), jax.jit(lambda packed: dequantize(packed).astype(dtype))(plain)


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The dense dot."""
    exact = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.matmul(x.astype(weight.dtype), weight, precision=exact, preferred_element_type=jnp.float32)


def _worth(name: str, problem: Problem) -> bool:
    """A GPU takes long for the reference's float32 where weights are large, and to unpack them for few tokens."""
    small = compat.platform() != "cuda" or problem.k * problem.n <= CHECKED
    return small if name == "reference" else name != "dense" or problem.m >= 64 or small


@functools.cache
def _chained(run: Callable[..., Any]) -> Callable[..., Any]:
    """Calls with several weights, compiled once for every size."""
    return jax.jit(lambda x, weights: [run(x, weight) for weight in weights])


def _for_this_device(plain: Packed, platform: str) -> Packed:
    """In the layout of the platform's own kernels where that holds the weight: as a model would be packed for it."""
    layout = own_layout(platform)
    return relayout(plain, layout) if LAYOUTS[layout].refuses(plain.spec) is None else plain


def rotating(run: Callable[..., Any], x: jax.Array, weight: Any, size: int, options: Options) -> Callable[[], Any]:
    """Calls with the next of enough copies of a weight to fill so many megabytes, at most 64; they return lists."""
    count = min(64, max(options.chain, -(-options.megabytes * 10**6 // max(size, 1))))
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(count)]
    chained = _chained(run)
    turn = itertools.count()
    take = lambda first: [copies[(first + i) % count] for i in range(options.chain)]
    return lambda: chained(x, take(next(turn) * options.chain))


def _row(
    case: Case, name: str, problem: Problem, micro: np.ndarray, dense: np.ndarray, limits: Device, error: float | None
) -> dict[str, Any]:
    p10, p50, p90 = (float(np.percentile(micro, q)) for q in (10, 50, 90))
    quantized = name in BACKENDS
    element = 4 if compat.platform() == "cpu" else 2
    moved = problem.num_bytes if quantized else problem.num_bytes + element * problem.batch * problem.k * problem.n
    kind = dot_type(problem) if quantized else "float32" if compat.platform() == "cpu" else problem.x_dtype
    least = 1e6 * limits.seconds(moved, problem.macs, kind if kind in limits.macs else "float32")
    return {
        "case": str(case),
        "format": case.format,
        "shape": f"{'x'.join(map(str, (*case.batch, case.k)))}x{case.n}",
        "m": case.m,
        "backend": name,
        "p50": round(p50, 1),
        "p10": round(p10, 1),
        "p90": round(p90, 1),
        "gb_per_s": round(moved / p50 / 1e3, 3),
        # The median of ratios within a repeat, which other work on the machine disturbs less than a ratio of medians.
        "speedup": round(float(np.median(dense / micro)), 3),
        "roofline_percent": round(100 * least / p50, 2),
        "max_error": None if error is None else float(f"{error:.2e}"),
    }


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    here = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if compat.platform() == "cpu":
        found = library()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kernels = {"native": found if isinstance(found, str) else found.kernels[0]}
        here |= {"processor": _processor(), "cores": cores, **kernels}
    return here


def _processor() -> str:
    """Its name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor()


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text: microseconds, and how many times faster than the dense dot; `*`: `auto` takes it."""
    cell = lambda value: {True: "*", False: ""}.get(value, str(value)) if isinstance(value, bool) else str(value)
    cells = [tuple(COLUMNS.values()), *[tuple(cell(row[column]) for column in COLUMNS) for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def run(options: Options, write: Callable[[dict[str, Any]], None] = lambda body: None) -> tuple[dict[str, Any], Table]:
    """Measure all cases of this platform.

    Args:
      options: what to measure.
      write: is given all results so far after every case.

    Returns:
      The results, as they are written, and the tuned table that follows from them.

    Raises:
      KernelError: `only` is no regular expression, or is found in no case.
    """
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        raise KernelError(f"{options.only!r} is not a regular expression ({error})") from error
    suite = (*CONFORMANCE, *(SPEED if compat.platform() == "cpu" else DECODE))
    cases = [case for case in suite if pattern.search(str(case))]
    if not cases:
        raise KernelError(f"no case matches {options.only!r}: the first of {len(suite)} is {suite[0]}")
    if min(options.repeats, options.chain) < 1 or options.megabytes < 0:
        raise KernelError("repeats and chain are at least 1, megabytes at least 0")
    start, limits = time.perf_counter(), ceilings(options.repeats)
    body = {
        "environment": environment(),
        "options": dataclasses.asdict(options),
        "ceilings": {"bytes_per_s": limits.bandwidth, "macs_per_s": dict(limits.macs)},
        "rows": [],
    }
    entries: list[Entry] = []
    for case in cases:
        if options.budget_s and time.perf_counter() - start > options.budget_s:
            break
        rows, measured = measure(case, options, limits)
        body["rows"] += rows
        entries += measured
        write(body)
    return body, new_table(body["environment"]["device"], entries)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--table", type=Path, help="tuned table to write")
    for field in dataclasses.fields(Options):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    out, table = given.pop("out"), given.pop("table")
    save = lambda path, value: path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    body, found = run(Options(**given), lambda body: save(out, body))
    if table is not None:
        save(table, as_json(found))
    print(show(body["rows"]))


if __name__ == "__main__":
    main()
