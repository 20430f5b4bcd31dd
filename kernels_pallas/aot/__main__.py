"""`python -m kernels_pallas.aot`: compile, print and write."""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels_pallas.aot import gpu, tpu
from kernels_pallas.tables import as_json, file_name


def versions(*names: str) -> dict[str, str]:
    """Of the distributions that decide what comes out."""
    return {name: importlib.metadata.version(name) for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    """Every kernel for every chip that is asked for; what a file has of other chips and versions stays there."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.aot", description=__doc__)
    parser.add_argument("target", choices=("tpu", "gpu"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--chips", nargs="+", choices=tuple(tpu.CHIPS), default=list(tpu.CHIPS))
    parser.add_argument("--tune", type=Path, help="folder for tuned tables of these chips, by cycles and bytes")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.target == "gpu":
        body: dict[str, Any] = {
            "versions": versions("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc"),
            "kernels": {case: gpu.measure(case) for case in gpu.CASES},
        }
        _write(given.out, body)
        for case, found in body["kernels"].items():
            print(f"{case}  {found['registers']} registers, {found['shared_bytes']} bytes shared")
        return
    # Another version of libtpu schedules otherwise: a budget holds for the version that it was made with.
    made = versions("jax", "jaxlib", "libtpu")
    body = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    here = body.setdefault(made["libtpu"], {"versions": made, "cycles": {}})
    for chip in given.chips:
        here["cycles"][chip] = {case: tpu.cycles(chip, case) for case in tpu.CASES}
        for case, count in here["cycles"][chip].items():
            print(f"{chip}  {case}  {'no profile' if count is None else f'{count} cycles'}", flush=True)
        _write(given.out, body)
        if given.tune is not None:
            table = tpu.tune(chip)
            given.tune.mkdir(parents=True, exist_ok=True)
            _write(given.tune / file_name(table.device), as_json(table))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
