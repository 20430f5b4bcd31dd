"""What the compilers make of the Hopper kernel for an H200: registers, spills, shared memory and instructions.

`python -m kernels_pallas.aot.gpu CASE` compiles one kernel; a description of the card (`h200.txtpb`) takes its place.
Mosaic leaves its PTX where it is told to, which `ptxas` assembles and `nvdisasm` lists. `warnings` are those of ptxas
about products that it had to serialize.
"""

import collections
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from kernels_pallas.cases import Case, shapes
from kernels_pallas.dispatch import BACKENDS
from kernels_pallas.errors import KernelError
from kernels_pallas.matmul import describe

CASES: Mapping[str, Case] = MappingProxyType(
    {
        str(case): case
        for case in (
            Case(1, 4096, 4096, 4, 128),
            Case(16, 8192, 8192, 4, 128),
            Case(64, 8192, 8192, 4, 128),
            Case(16, 8192, 8192, 8),
            Case(16, 8192, 8192, 2, 128),
            Case(16, 8192, 8192, 4, 128, nf4=True),
            Case(16, 8192, 8192, 4, 128, activation_bits=8),
            Case(64, 8192, 8192, 4, 128, activation_bits=8),
            Case(16, 8192, 8192, 8, activation_bits=8),
            Case(256, 8192, 8192, 8, activation_bits=8),
            Case(2048, 8192, 8192, 4, 128, activation_bits=8),
            Case(256, 8192, 8192, 4, 128),
            Case(16, 8192, 8192, 4, 64),
            Case(16, 8192, 8192, 4, 32),
            Case(16, 8192, 8192, 4, 32, activation_bits=8),
            Case(16, 4096, 14336, 4, 128, batch=(8,)),
        )
    }
)
"""What is compiled, by name. Those of 256 tokens and more are in clusters."""

ARCHITECTURE = "sm_90a"

_TARGET = Path(__file__).parent / "h200.txtpb"


def compile_one(case: Case) -> None:
    """In this process, whose environment `measure` has set: through XLA and Mosaic to machine code."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    text = _TARGET.read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=text, topology="1x1x1")
    place = SingleDeviceSharding(topology.devices[0])
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    x, packed = jax.tree.map(put, shapes(case, "hopper"))
    config = BACKENDS["hopper"].tiles(describe(x, packed, case.activation_bits))
    run = lambda x, packed: BACKENDS["hopper"](x, packed, case.activation_bits, config=config)
    function = jax.jit(run, out_shardings=place)
    function.trace(x, packed).lower(lowering_platforms=("cuda",)).compile()


def measure(case: str) -> dict[str, Any]:
    """Registers, bytes of spills and of shared memory a block, and how often each instruction stands in the kernel.

    Under `rounding` it has the same of the kernel that rounds activations, but for the memory, if there is one.

    Raises:
      KernelError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
        }
        command = [sys.executable, "-m", "kernels_pallas.aot.gpu", case]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        sources = {path.name.startswith("mpq_round"): path for path in sorted(Path(folder).rglob("*.ptx"))}
        if found.returncode or False not in sources:
            last = [line for line in found.stderr.splitlines() if "Error" in line][-1:]
            raise KernelError(f"{case} does not compile for an H200: {''.join(last)[:500]}")
        log = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.mlir-passes.log")))
        shared = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", log)
        rounding = {"rounding": _assemble(sources[True])} if True in sources else {}
        return {**_assemble(sources[False]), "shared_bytes": max(map(int, shared), default=0), **rounding}


def _assemble(ptx: Path) -> dict[str, Any]:
    binary = ptx.with_suffix(".cubin")
    said = _tool("ptxas", f"-arch={ARCHITECTURE}", "-v", "-o", str(binary), str(ptx)).stderr
    listing = _tool("nvdisasm", "-c", str(binary)).stdout
    number = lambda pattern: max(map(int, re.findall(pattern, said)), default=0)
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "warnings": sorted(set(re.findall(r"\bC75\d\d\b", said))),
        "instructions": dict(sorted(opcodes(listing).items())),
    }


def opcodes(listing: str) -> dict[str, int]:
    """How often each instruction stands in a listing of `nvdisasm`."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing)
    return dict(collections.Counter(found))


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of the CUDA wheels."""
    folders = importlib.util.find_spec("nvidia")
    places = [] if folders is None else [Path(place) for place in folders.submodule_search_locations or ()]
    path = next((path for place in places for path in sorted(place.rglob(f"bin/{name}"))), None)
    if path is None:
        raise KernelError(f"there is no {name}: install mpq[aot]")
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)


if __name__ == "__main__":
    compile_one(CASES[sys.argv[1]])
