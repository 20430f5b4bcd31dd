"""Estimated cycles of the TPU kernels, from libtpu's static profile of the code that it compiled.

`python -m kernels_pallas.aot.tpu CHIP CASE TILES [FOLDER]` compiles one kernel and prints its cycles: null without a
folder for the profile, or where libtpu writes none. They are those of a kernel's schedule, without waiting for memory:
a lower limit of its time, beside that of the bytes (`devices`).
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp

from kernels_pallas import cases
from kernels_pallas.backend import Config, Problem, dot_type
from kernels_pallas.cases import Case
from kernels_pallas.devices import device
from kernels_pallas.dispatch import BACKENDS
from kernels_pallas.errors import KernelError
from kernels_pallas.matmul import describe
from kernels_pallas.packed import Packed
from kernels_pallas.tables import Entry, Table, new_table
from kernels_pallas.tpu import largest_tiles, tiles


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Attributes:
      topology: the smallest that libtpu knows of it.
      kind: as JAX names the device.
      clock: cycles a second, from public descriptions; it weighs cycles against bytes.
    """

    topology: str
    kind: str
    clock: float


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip("v5e:2x2", "TPU v5 lite", 1.5e9),
        "v5p": Chip("v5p:2x2x1", "TPU v5", 1.75e9),
        "v6e": Chip("v6e:2x2", "TPU v6 lite", 1.75e9),
        "tpu7x": Chip("tpu7x:2x2x1", "TPU7x", 2.3e9),
    }
)

CASES: Mapping[str, Case] = MappingProxyType(
    {
        str(case): case
        for case in (
            Case(16, 4096, 4096, 4, 128),
            Case(16, 4096, 4096, 4, 32),
            Case(16, 4096, 4096, 8),
            Case(16, 4096, 4096, 2, 128),
            Case(16, 4096, 4096, 8, activation_bits=8),
            Case(16, 4096, 4096, 4, 128, activation_bits=8),
            Case(256, 4096, 4096, 4, 128),
            Case(16, 4096, 11008, 4, 128),
        )
    }
)
"""What is compiled, by name: decode of every format, prefill, and a layer that is no square."""


def shapes(case: Case, layout: str) -> tuple[jax.ShapeDtypeStruct, Packed]:
    """As `cases.shapes`; activations that shall be rounded are codes already."""
    x, packed = cases.shapes(case, layout)
    return jax.ShapeDtypeStruct(x.shape, jnp.int8 if case.activation_bits else x.dtype), packed


def problem_of(case: Case, layout: str) -> Problem:
    """What dispatch knows a case by."""
    x, packed = shapes(case, layout)
    return describe(x, packed, None)


def compile_one(chip: str, case: Case, config: Config, profile: Path | None) -> int | None:
    """In this process, whose environment `cycles` has set: the estimated cycles of the kernel."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    place = SingleDeviceSharding(device)
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    x, packed = jax.tree.map(put, shapes(case, "tpu"))
    run = functools.partial(BACKENDS["tpu"], activation_bits=case.activation_bits, config=config)
    function = jax.jit(lambda x, packed: run(x, packed), out_shardings=place)
    function.trace(x, packed).lower(lowering_platforms=("tpu",)).compile()
    text = "" if profile is None else "\n".join(path.read_text() for path in sorted(profile.iterdir()))
    found = re.findall(r'hlo_op_name: "mpq_[^"]*"\s+estimated_cycles: (\d+)', text)
    return sum(map(int, found)) or None


def cycles(chip: str, case: str, config: Config | None = None) -> int | None:
    """The same in a process of its own, of the tiles that the backend takes by itself or others; None: no profile.

    Raises:
      KernelError: it does not compile.
    """
    config = tiles(problem_of(CASES[case], "tpu")) if config is None else config
    with tempfile.TemporaryDirectory() as folder:
        found = _run(chip, case, config, folder)
        if found.returncode:  # a profile of what it cannot describe ends the process; compiling does not
            found = _run(chip, case, config, None)
    if found.returncode:
        last = [line for line in found.stderr.splitlines() if line.strip()][-1:]
        raise KernelError(f"{case} with tiles {config} does not compile for {chip}: {''.join(last)[:500]}")
    return json.loads(found.stdout.splitlines()[-1])


def tune(chip: str, count: int = 4) -> Table:
    """For every case the best of so many tiles, the largest that are legal, by the longer of cycles and bytes."""
    kind, clock = CHIPS[chip].kind, CHIPS[chip].clock
    entries = []
    for name, case in CASES.items():
        problem = problem_of(case, "tpu")
        own = tiles(problem)
        found = {config: cycles(chip, name, config) for config in dict.fromkeys([own, *largest_tiles(problem, count)])}
        times = {config: count / clock for config, count in found.items() if count is not None}
        if times:
            best = min(times, key=times.__getitem__)
            seconds = max(times[best], device(kind, "tpu").seconds(problem.num_bytes, problem.macs, dot_type(problem)))
            entries.append(Entry(problem, "tpu", best, "aot", round(1e6 * seconds, 1)))
    return new_table(kind, entries)


def _run(chip: str, case: str, config: Config, folder: str | None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud about the machine
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}" if folder else "",
    }
    arguments = [chip, case, json.dumps(config), *([folder] if folder else [])]
    command = [sys.executable, "-m", "kernels_pallas.aot.tpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    _, name, case, config, *folder = sys.argv
    place = Path(folder[0]) if folder else None
    print(json.dumps(compile_one(name, CASES[case], tuple(json.loads(config)), place)))
