"""How long the exact frontier takes, and the Lagrangian relaxation, and HiGHS for a single budget beside them.

Run:     python -m experiments.bench_allocate --out experiments/results/bench_allocate.json
Takes:   about two minutes on 2 cores, of which HiGHS has 60 s at most
Expect:  300 groups x 8 schemes of a transformer under 1 s of processor time, 1,000 x 8 and 2,000 x 8 under 10 s; the
         Lagrangian relaxation of 20,000 x 6 about 0.1 s, with a relative gap of 1e-7
Writes:  one JSON file, and a table on standard output: seconds of processor time, best of `--repeats`, and wall time
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy
import tyro
from rich.console import Console
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mpq.allocate import Lagrangian, Problem, solve_frontier
from mpq.formats import parse_scheme
from mpq.types import Use, WeightSpec

TEXTS = ("int2_g64", "int2_g32", "int3_g64", "int3_g32", "int4_g64", "int4_g32", "int8_channel", "bf16")
SCHEMES = tuple(map(parse_scheme, TEXTS))
Result = TypeVar("Result")


def _weight(path: str, k: int, n: int, group: str) -> WeightSpec:
    return WeightSpec(path, path, (), (k, n), (0, 1), 1, k, n, group, (Use("matmul", group, k * n),))


def _problem(members: list[tuple[WeightSpec, ...]], rng: np.random.Generator) -> Problem:
    """Losses like 4^-bits per weight, with a lognormal spread over groups (sigma 1) and schemes (0.05)."""
    weights = np.array([sum(spec.size for spec in group) for group in members], np.float64)
    bits = np.array([scheme.size_bits(4096, 4096) / 4096**2 for scheme in SCHEMES])
    spread = rng.lognormal(0, 1.0, (len(members), 1)) * rng.lognormal(0, 0.05, (len(members), len(SCHEMES)))
    loss = 16 * (weights / weights.sum())[:, None] * 4.0**-bits * spread
    size_bits = np.array([[sum(spec.size_bits(s) for spec in group) for s in SCHEMES] for group in members], np.int64)
    names = tuple(group[0].group for group in members)
    return Problem(names, tuple(members), SCHEMES, loss, np.zeros_like(loss), size_bits, np.ones(loss.shape, np.bool_))


def transformer(num_groups: int, dim: int = 2048, kv: int = 512, ffn: int = 5632, vocab: int = 32000) -> Problem:
    """Layers of four fused groups (q/k/v, out, gate/up, down), and the embedding."""
    layer = {
        "qkv": [(dim, dim), (dim, kv), (dim, kv)],
        "out": [(dim, dim)],
        "gate_up": [(dim, ffn), (dim, ffn)],
        "down": [(ffn, dim)],
    }
    members = [
        tuple(_weight(f"{index}.{name}.{i}", k, n, f"{index}.{name}") for i, (k, n) in enumerate(shapes))
        for index in range((num_groups + 2) // 4)
        for name, shapes in layer.items()
    ][: num_groups - 1]
    members.append((_weight("embedding", dim, vocab, "embedding"),))
    return _problem(members, np.random.default_rng(num_groups))


def unrelated_shapes(num_groups: int) -> Problem:
    """Every group another shape, k and n random multiples of 64 up to 4096: hardly two sizes have much in common."""
    rng = np.random.default_rng(num_groups)
    shapes = 64 * rng.integers(1, 65, (num_groups, 2))
    return _problem([(_weight(f"{i}", int(k), int(n), f"{i}"),) for i, (k, n) in enumerate(shapes)], rng)


def random_sizes(num_groups: int, num_schemes: int) -> Problem:
    """Sizes uniform up to 10^9 bits, losses uniform, both sorted: no structure at all."""
    rng = np.random.default_rng(num_groups)
    shape = (num_groups, num_schemes)
    members = tuple((_weight(f"{i}", 64, 64, f"{i}"),) for i in range(num_groups))
    size_bits = np.sort(rng.integers(1, 10**9, shape), axis=1)
    loss = -np.sort(-rng.random(shape), axis=1)
    names = tuple(str(i) for i in range(num_groups))
    return Problem(names, members, SCHEMES[:num_schemes], loss, np.zeros(shape), size_bits, np.ones(shape, np.bool_))


def highs(problem: Problem, budget_bits: int, time_limit: float) -> dict[str, str | float | None]:
    """One budget by mixed-integer programming, for comparison."""
    groups, schemes = problem.loss.shape
    scale = float(problem.loss.max())
    unit = int(np.gcd.reduce(problem.size_bits.ravel()))
    columns = np.arange(groups * schemes)
    one_each = csr_array((np.ones(groups * schemes), (columns // schemes, columns)))
    result = milp(
        problem.loss.ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(
                (problem.size_bits // unit).ravel()[None].astype(np.float64), -np.inf, budget_bits // unit
            ),
        ],
        integrality=np.ones(groups * schemes),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": time_limit},
    )
    scaled = lambda value: None if value is None else float(value) * scale
    return {"message": result.message, "loss": scaled(result.fun), "bound": scaled(result.mip_dual_bound)}


def _timed(solve: Callable[[], Result], repeats: int) -> tuple[Result, dict[str, float]]:
    """Result, and least processor time and least wall time in seconds."""
    cpu, wall, results = [], [], []
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        results = [solve()]  # one at a time in memory
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return results[0], {"cpu_s": min(cpu), "wall_s": min(wall)}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      out: JSON file to write.
      repeats: the best of so many runs counts.
      highs_seconds: time limit of HiGHS; 0: leave it out.
    """

    out: Path
    repeats: int = 3
    highs_seconds: float = 60.0


def run(options: Options) -> dict[str, Any]:
    """All measurements."""
    instances = {
        "transformer, 32 layers (129 x 8)": transformer(129, dim=4096, kv=1024, ffn=14336, vocab=128256),
        "transformer (300 x 8)": transformer(300),
        "transformer (1000 x 8)": transformer(1000),
        "transformer (2000 x 8)": transformer(2000),
        "unrelated shapes (300 x 8)": unrelated_shapes(300),
        "random sizes (300 x 8)": random_sizes(300, 8),
    }
    rows: list[dict[str, Any]] = []
    for name, problem in instances.items():
        frontier, seconds = _timed(lambda problem=problem: solve_frontier(problem), options.repeats)
        passes = len(frontier.points.roots)
        rows.append({"solver": "frontier", "instance": name, "points": len(frontier), "passes": passes, **seconds})
    many = random_sizes(20_000, 6)
    middle = (many.min_bits + many.max_bits) // 2
    allocation, seconds = _timed(lambda: Lagrangian().solve(many, middle), options.repeats)
    gap = allocation.gap / allocation.loss
    rows.append({"solver": "lagrangian", "instance": "random sizes (20000 x 6)", "relative_gap": gap, **seconds})
    if options.highs_seconds:
        name = "transformer (300 x 8)"
        problem = instances[name]
        budget_bits = int(3.5 * problem.num_weights)
        found, seconds = _timed(lambda: highs(problem, budget_bits, options.highs_seconds), 1)
        exact = solve_frontier(problem).at(bits=budget_bits).loss
        rows.append({"solver": "HiGHS, one budget", "instance": name, **found, "exact": exact, **seconds})
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    machine = {**versions, "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    return {"machine": machine, "repeats": options.repeats, "rows": rows}


def main(options: Options) -> None:
    """Measures, prints, writes."""
    result = run(options)
    table = Table("solver", "instance", "points", "passes", "processor s", "wall s", "")
    for row in result["rows"]:
        note = f"gap {row['relative_gap']:.1e}" if "relative_gap" in row else ""
        if "exact" in row:
            above = "no solution" if row["loss"] is None else f"{row['loss'] / row['exact'] - 1:.1e} above the optimum"
            note = f"{row['message']}: {above}"
        cells = (row["solver"], row["instance"], f"{row.get('points', '')}", f"{row.get('passes', '')}")
        table.add_row(*cells, f"{row['cpu_s']:.2f}", f"{row['wall_s']:.2f}", note)
    Console(width=160).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
