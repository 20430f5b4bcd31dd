"""Tuned tables: what was fastest on a kind of device, as JSON.

A table is `{"device": kind as JAX names it, "versions": {"jax": ..., "jaxlib": ...}, "entries": [...]}` in a file
`KIND.json`, the kind in lower case with everything else but letters and digits a hyphen. An entry is `{"problem":
fields of Problem, "backend": name, "config": tiles, "source": "measured" or "aot", "microseconds": of one call}`; `aot`
entries were predicted from what a compiler says of code that never ran. A table that `mpq bench kernels --tune` wrote,
in the user's cache, goes before the one that ships with this package.
"""

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from kernels_pallas.backend import Config, Problem
from kernels_pallas.errors import KernelError

FAR = 3.0
"""Sum over m, k and n of |log2 of the ratio| beyond which an entry says nothing about a problem."""

SOURCES = ("measured", "aot")

_SHIPPED = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a tuned table; the fields are those of the file."""

    problem: Problem
    backend: str
    config: Config
    source: str
    microseconds: float


@dataclasses.dataclass(frozen=True)
class Table:
    """A tuned table; the fields are those of the file."""

    device: str
    versions: dict[str, str]
    entries: tuple[Entry, ...]


def new_table(device: str, entries: Sequence[Entry]) -> Table:
    """A table of the versions that run here."""
    return Table(device, {"jax": jax.__version__, "jaxlib": jaxlib.__version__}, tuple(entries))


def as_json(table: Table) -> dict[str, Any]:
    """The value of a table's file."""
    return dataclasses.asdict(table)


def read_table(text: str) -> Table:
    """The inverse of `as_json`, from text.

    Raises:
      KernelError: that is no table.
    """
    try:
        body = json.loads(text)
        entries = [
            Entry(**{**entry, "problem": Problem(**entry["problem"]), "config": tuple(entry["config"])})
            for entry in body["entries"]
        ]
        table = Table(body["device"], dict(body["versions"]), tuple(entries))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise KernelError(f"not a tuned table ({type(error).__name__}: {error})") from error
    if odd := [entry.source for entry in entries if entry.source not in SOURCES]:
        raise KernelError(f"an entry of a tuned table has the source {odd[0]!r}: allowed are {', '.join(SOURCES)}")
    return table


def file_name(kind: str) -> str:
    """Of the table of a kind of device."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def own_folder() -> Path:
    """Where this user's tables are kept: `mpq/tuned` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq" / "tuned"


@functools.cache
def entries(kind: str) -> tuple[Entry, ...]:
    """Tuned entries of a kind of device; empty if nobody tuned it. What cannot be read is warned of and left aside."""
    for folder in (own_folder(), _SHIPPED):
        path = folder / file_name(kind)
        try:
            return read_table(path.read_text(encoding="utf-8")).entries
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is left aside: {error}; remove it or tune again", stacklevel=2)
    return ()


def nearest(problem: Problem, entries: Sequence[Entry]) -> Entry | None:
    """The fastest entry of the nearest size among those alike in all else; None if all are far.

    Activations of another dtype and weights with zero points beside such without count as one doubling.
    """

    def alike(other: Problem) -> bool:
        free = {name: getattr(problem, name) for name in ("m", "k", "n", "zeros", "x_dtype")}
        return dataclasses.replace(other, **free) == problem

    def distance(other: Problem) -> float:
        pairs = ((problem.m, other.m), (problem.k, other.k), (problem.n, other.n))
        odd = (problem.x_dtype != other.x_dtype) + (problem.zeros != other.zeros)
        return odd + sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)

    found = [entry for entry in entries if alike(entry.problem) and distance(entry.problem) <= FAR]
    return min(found, key=lambda entry: (distance(entry.problem), entry.microseconds), default=None)
