"""How fast GPTQ rounds one large weight, beside the loop of the reference implementations in PyTorch.

Run:     python -m experiments.bench_gptq --repeats 7 --out experiments/results/bench_gptq.json
         python -m experiments.bench_gptq --decay 0 --out experiments/results/bench_gptq_flat.json
         (both need PyTorch: pip install torch)
Aim:     3 times the speed of the loop at 4096 x 4096 in groups of 128 on two cores with nothing else running, where the
         gram's eigenvalues fall as a language model's do; the same layer loss; at most 4 times the weight plus the gram
         in memory
Writes:  one JSON object: seconds of both, and those of all their threads, of `repeats` calls after one that compiles;
         the ratios of the shortest; layer losses over that of rounding to nearest; what each holds at most, weight and
         gram included, in sizes of the weight plus the gram; and the load of the machine

Each runs in a process of its own, on the same weight and gram, in turn. `loop` is Algorithm 1 of the paper (Frantar et
al. 2022, arXiv:2210.17323) as published implementations run it: one row after another in Python, the inverse's Cholesky
factor, updates collected over blocks of 128 rows. Both choose absmax scales and zero points from the updated weights of
a group, round the rows in storage order, and damp the gram by 1 % of its mean; `ours_mse` searches the scales, too.
Memory is what a call adds at most to what the process held before it, weight and gram counted in.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mpq.files import write_json
from mpq.formats import parse_scheme
from mpq.quantize import GPTQ, RTN
from mpq.record import RunRecord

CLOCKS = {"seconds": time.perf_counter, "core_seconds": time.process_time}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: JSON file, or None.
      k, n: shape of the weight.
      scheme: with zero points, in groups that divide `k`.
      repeats: of every timing.
      threads: of PyTorch; JAX takes all cores there are.
      decay: the gram's eigenvalues fall as i ** -decay. The power is .6 to 1.9 for weights of the language models
        here, and what `ours` does to be sure that no column is worse than rounded to nearest takes longest at 0.
      seed: of weight and inputs.
    """

    out: Path | None = None
    k: int = 4096
    n: int = 4096
    scheme: str = "int4_g128_zp"
    repeats: int = 3
    threads: int = 2
    decay: float = 1.0
    seed: int = 0


def problem(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """A random weight `float32[k, n]`, and the gram of inputs of unequal size, its eigenvalues falling as a power."""
    k, rng = options.k, np.random.default_rng(options.seed)
    w = rng.standard_normal((k, options.n), np.float32) / np.float32(k**0.5)
    x = rng.standard_normal((2 * k, k), np.float32) * np.arange(1, k + 1, dtype=np.float32) ** (-options.decay / 2)
    x = x @ rng.standard_normal((k, k), np.float32)
    x *= np.exp(0.5 * rng.standard_normal(k)).astype(np.float32)
    return w, x.T @ x / np.float32(len(x))


def main(options: Options) -> None:
    """Measure, print, write."""
    results = {name: measure(options, name) for name in ("loop", "ours", "ours_mse")}
    ratio = lambda name, clock: round(min(results["loop"][clock]) / min(results[name][clock]), 2)
    body = {
        "results": results,
        "loop_over_ours": {clock: ratio("ours", clock) for clock in CLOCKS},
        "loop_over_ours_mse": {clock: ratio("ours_mse", clock) for clock in CLOCKS},
        "load": os.getloadavg(),
        "record": RunRecord.collect(
            dataclasses.asdict(options) | {"out": None},
            seeds={"problem": options.seed},
            inputs={},
            command="python -m experiments.bench_gptq",
        ).to_json(),
    }
    print(json.dumps({key: value for key, value in body.items() if key != "record"}, indent=1))
    if options.out is not None:
        write_json(options.out, body)


def measure(options: Options, name: str) -> dict[str, Any]:
    """Seconds, layer loss over that of rounding to nearest, and memory, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        w, gram = problem(options)
        np.savez(file.name, w=w, gram=gram)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times, rounded, added = pool.apply(run, (options, name, file.name))
    nearest = np.asarray(RTN()(jnp.asarray(w)[None], parse_scheme(options.scheme)).dequantize()[0])
    given = w.nbytes + gram.nbytes
    over = {"loss_over_rtn": loss(w, rounded, gram) / loss(w, nearest, gram)}
    return {**times, **over, "peak_over_weight_and_gram": round((added + given) / given, 2)}


def run(options: Options, name: str, path: str) -> tuple[dict[str, list[float]], np.ndarray, int]:
    """Times of every call, what the codes stand for, and the most bytes that a call took."""
    with np.load(path) as file:
        w, gram = file["w"], file["gram"]
    scheme = parse_scheme(options.scheme)
    if name == "loop":
        torch = importlib.import_module("torch")
        torch.set_num_threads(options.threads)
        arrays = torch.from_numpy(w).T.contiguous(), torch.from_numpy(gram)
        size, steps = scheme.group_size or options.k, 2**scheme.format.bits - 1
        call = lambda: rounded_by_loop(*arrays, size, steps)
        values = lambda got: got.T.numpy()
    else:
        weight, moments = jnp.asarray(w)[None], jnp.asarray(gram)[None]
        quantizer = GPTQ(scale="mse" if name == "ours_mse" else "absmax")
        call = lambda: jax.block_until_ready(quantizer(weight, scheme, moments))
        values = lambda got: np.asarray(got.dequantize()[0])
    got, times, peaks = call(), {clock: [] for clock in CLOCKS}, []
    for _ in range(options.repeats):
        got, held = None, peak_memory(reset=True)
        start = [read() for read in CLOCKS.values()]
        got = call()
        for (clock, read), before in zip(CLOCKS.items(), start, strict=True):
            times[clock].append(round(read() - before, 3))
        peaks.append(peak_memory() - held)
    return times, values(got), max(peaks)


def peak_memory(reset: bool = False) -> int:
    """The most bytes that this process held since the last reset (Linux, proc(5))."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def rounded_by_loop(weight: Any, gram: Any, group: int, steps: int, damping: float = 0.01, block: int = 128) -> Any:
    """What the codes stand for, a tensor like `weight[n, k]`, outputs first as PyTorch stores them.

    Whole groups make up a block.
    """
    torch = importlib.import_module("torch")
    weight, k, block = weight.clone(), weight.shape[1], group * max(1, block // group)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(k)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(weight)
    scale = zero = torch.zeros(len(weight))
    for first in range(0, k, block):
        last = min(first + block, k)
        part, links = weight[:, first:last].clone(), upper[first:last, first:last]
        errors = torch.zeros_like(part)
        for column in range(last - first):
            if (first + column) % group == 0:
                here = part[:, column : column + group]
                low, high = here.amin(dim=1).clamp(max=0), here.amax(dim=1).clamp(min=0)
                scale = (high - low) / steps
                zero = torch.round(-low / scale)
            value = part[:, column]
            code = torch.clamp(torch.round(value / scale) + zero, 0, steps)
            rounded = scale * (code - zero)
            result[:, first + column] = rounded
            error = (value - rounded) / links[column, column]
            part[:, column:] -= error[:, None] @ links[column : column + 1, column:]
            errors[:, column] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return result


def loss(w: np.ndarray, got: np.ndarray, gram: np.ndarray) -> float:
    """tr(eT gram e)."""
    error = w - got
    return float(np.sum(error * (gram @ error), dtype=np.float64))


if __name__ == "__main__":
    main(tyro.cli(Options))
