"""Which backend computes a problem, and with which tiles.

In this order: the entry of the device's tuned table for exactly this problem; that of the nearest problem of the same
format, group size and layout; else the smallest prediction from bytes and operations. Never a fixed tile, with which
libraries are slowest where nobody tuned. `reference` reads every layout on every platform, so there is always one.

A table is `tuned/KIND.json`, with `KIND` as JAX names the device, lower case, everything else but letters and digits a
hyphen: a list of entries `{"problem": fields of Problem, "backend": name, "config": tiles, "source": "measured" or
"compiled", "microseconds": of one call}`.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from kernels_pallas import compat
from kernels_pallas import reference as contract
from kernels_pallas.backend import Backend, Config, Problem, dot_type
from kernels_pallas.cpu import CPU
from kernels_pallas.devices import Device, device
from kernels_pallas.errors import KernelError
from kernels_pallas.hopper import HOPPER
from kernels_pallas.native import NATIVE
from kernels_pallas.tpu import TPU

FAR = 3.0
"""Sum over m, k and n of |log2 of the ratio| beyond which an entry says nothing about a problem."""


def _reference_seconds(problem: Problem, device: Device) -> float:
    """Codes unpacked, and a float32 weight written and read again before the dot."""
    elements = problem.batch * problem.k * problem.n
    moved = problem.num_bytes + 2 * 4 * elements
    return device.seconds(moved, problem.macs, "float32") + elements / device.unpack


def _reference_refuses(problem: Problem) -> str | None:
    return "values of a table have no integer product" if problem.table and problem.activation_bits else None


REFERENCE = Backend(
    platforms=(),
    layouts=(),
    interpretable=True,
    run=contract.matmul,
    refuses=_reference_refuses,
    seconds=_reference_seconds,
    complete=True,
)

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {"reference": REFERENCE, "cpu": CPU, "native": NATIVE, "tpu": TPU, "hopper": HOPPER}
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a tuned table; the fields are those of the file."""

    problem: Problem
    backend: str
    config: Config
    source: str
    microseconds: float


def read_table(text: str) -> tuple[Entry, ...]:
    """Entries of the JSON text of a table."""
    return tuple(
        Entry(**{**entry, "problem": Problem(**entry["problem"]), "config": tuple(entry["config"])})
        for entry in json.loads(text)
    )


@functools.cache
def table(kind: str) -> tuple[Entry, ...]:
    """Tuned entries of a kind of device; empty if nobody tuned it."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    path = Path(__file__).parent / "tuned" / f"{name}.json"
    return read_table(path.read_text(encoding="utf-8")) if path.exists() else ()


def refusal(backend: Backend, problem: Problem, platform: str, interpret: bool) -> str | None:
    """Why a backend cannot compute a problem here, or None."""
    if backend.layouts and problem.layout not in backend.layouts:
        return f"it reads layout {', '.join(backend.layouts)}, not {problem.layout!r}: use `relayout`"
    if interpret and not backend.interpretable:
        return "it has no kernel to interpret: leave `interpret` out"
    if backend.platforms and platform not in backend.platforms and not interpret:
        return f"it runs on {', '.join(backend.platforms)}, not on {platform}: use backend='auto'"
    return backend.refuses(problem)


def choose(
    problem: Problem, platform: str, entries: Sequence[Entry] | None = None, interpret: bool = False
) -> tuple[str, Config]:
    """Name of the backend and its config, as the module says.

    Args:
      problem: what is to be computed.
      platform: `cpu`, `tpu` or `cuda`.
      entries: a tuned table; None for that of the device.
      interpret: only backends that can be interpreted.

    Raises:
      KernelError: not even the reference can.
    """
    kind = compat.device_kind(platform)
    able = [name for name, backend in BACKENDS.items() if refusal(backend, problem, platform, interpret) is None]
    if not able:
        raise KernelError(f"no backend computes {problem.format}: {REFERENCE.refuses(problem)}")
    near = nearest(problem, [e for e in (table(kind) if entries is None else entries) if e.backend in able])
    name = near.backend if near else min(able, key=lambda n: BACKENDS[n].seconds(problem, device(kind, platform)))
    fits = near is not None and BACKENDS[name].legal(problem, near.config)
    return name, near.config if near is not None and fits else BACKENDS[name].tiles(problem)


def nearest(problem: Problem, entries: Sequence[Entry]) -> Entry | None:
    """The fastest entry of the nearest size among those alike in all else; None if all are far."""

    def alike(other: Problem) -> bool:
        return dataclasses.replace(other, m=problem.m, k=problem.k, n=problem.n) == problem

    def distance(other: Problem) -> float:
        pairs = ((problem.m, other.m), (problem.k, other.k), (problem.n, other.n))
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)

    found = [entry for entry in entries if alike(entry.problem) and distance(entry.problem) <= FAR]
    return min(found, key=lambda entry: (distance(entry.problem), entry.microseconds), default=None)


def roofline(problem: Problem, platform: str) -> float:
    """Seconds that the problem takes at least on the device, or on a usual one of its platform."""
    limits = device(compat.device_kind(platform), platform)
    return limits.seconds(problem.num_bytes, problem.macs, dot_type(problem))
