"""What PyTorch takes on a GPU for the matmuls of `kernels_pallas.bench`: dense, packed int4, and int8.

    python -m experiments.kernel_peers --out FILE

`torch.mm` in bfloat16 (cuBLAS), `torch._weight_int4pack_mm` (tinygemm, groups of 128) and `torch._int_mm` (cuBLASLt,
int8 operands rounded before, and at least 17 tokens, as it asks). Copies of a weight fill 256 MB, and one graph of a
call on each is replayed, so that no time is of a launch by the host; microseconds a call, medians of replays.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ((8192, 8192), (4096, 4096), (8192, 57344), (4096, 11008), (28672, 8192))
TOKENS = (1, 16, 64, 256, 2048)
GROUP = 128


def peers(torch: Any, m: int, k: int, n: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Name of each to a maker of weights, and the call on one."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")

    def packed() -> Any:
        nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
        return torch._convert_weight_to_int4pack(nibbles, 8), scales

    found = {
        "torch_mm_bfloat16": (lambda: torch.randn(k, n, dtype=torch.bfloat16, device="cuda"), lambda w: torch.mm(x, w)),
        "torch_weight_int4pack_mm": (packed, lambda w: torch._weight_int4pack_mm(x, w[0], GROUP, w[1])),
    }
    if m > 16:
        weight = lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda").t()
        found["torch_int_mm"] = (weight, lambda w: torch._int_mm(codes, w))
    return found


def microseconds(torch: Any, make: Callable[[], Any], call: Callable[[Any], Any], size: int, repeats: int) -> float:
    """Of one call, with copies of a weight of so many bytes in turn."""
    copies = [make() for _ in range(min(32, max(1, -(-256 * 10**6 // size))))]
    for weight in copies[:2]:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(weight) for weight in copies]
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1e3 * start.elapsed_time(end) / len(copies))
    del results
    return statistics.median(taken)


def main() -> None:
    """Measure and write, after every size."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kernel_peers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch = importlib.import_module("torch")

    rows: list[dict[str, Any]] = []
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for k, n in SHAPES:
        for m in TOKENS:
            for name, (make, call) in peers(torch, m, k, n).items():
                row: dict[str, Any] = {"peer": name, "m": m, "shape": f"{k}x{n}"}
                try:
                    size = k * n * {"torch_mm_bfloat16": 4, "torch_weight_int4pack_mm": 1}.get(name, 2) // 2
                    row["us"] = round(microseconds(torch, make, call, size, options.repeats), 1)
                except RuntimeError as error:  # what a version of PyTorch does not take is told, not hidden
                    row["error"] = str(error).splitlines()[0]
                rows.append(row)
                print(row, flush=True)
            options.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
