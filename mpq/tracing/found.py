"""From reads and notes to weights: one `WeightSpec` a weight, fused groups, and a reason for everything else."""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping

import jax
from jax import numpy as jnp

from mpq.tracing import layout
from mpq.tracing.follow import SCALE
from mpq.tracing.reads import Read, Slot, show_index
from mpq.tracing.walk import Note
from mpq.types import Use, WeightSpec


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A parameter that is no weight, or that is also read where it cannot be replaced, and why."""

    path: str
    reason: str


def weights(
    params: Mapping[str, jax.ShapeDtypeStruct], reads: list[Read], notes: list[Note]
) -> tuple[dict[Slot, WeightSpec], dict[int, tuple[Slot, Use]], tuple[Skipped, ...]]:
    """The weights among `params`.

    Args:
      params: path -> shape and dtype.
      reads: of parameters, in the order of execution.
      notes: where else parameters went.

    Returns:
      The weights, by slot, in the order of their first read; slot and use of every read of a weight, by its number;
      what is skipped. Every parameter is in the first, in the last or, in part, in both.
    """
    by_slot: dict[Slot, list[int]] = {}
    for number, read in enumerate(reads):
        by_slot.setdefault(read.slot, []).append(number)
    refused = _refused(params, {slot: [reads[i] for i in numbers] for slot, numbers in by_slot.items()}, notes)
    kept = {slot: numbers for slot, numbers in by_slot.items() if slot.param not in refused}

    inputs: dict[Hashable, str] = {}
    uses = {
        i: (slot, Use(read.kind, inputs.setdefault(read.input, f"x{len(inputs)}"), read.macs))
        for i, read in enumerate(reads)
        if (slot := read.slot) in kept
    }
    groups = _groups({slot: [uses[i][1] for i in numbers] for slot, numbers in kept.items()})
    specs = {
        slot: _spec(slot, _decisive([reads[i] for i in numbers]), groups[slot], tuple(uses[i][1] for i in numbers))
        for slot, numbers in kept.items()
    }
    return specs, uses, tuple(_skipped(params, kept, refused, notes))


def scales(reads: Iterable[Read], notes: Iterable[Note]) -> frozenset[str]:
    """Parameters that do nothing but multiply or divide activations, element by element."""
    others = {read.slot.param for read in reads} | {note.slot.param for note in notes if note.reason != SCALE}
    return frozenset(note.slot.param for note in notes) - others


def _spec(slot: Slot, read: Read, group: str, uses: tuple[Use, ...]) -> WeightSpec:
    factors, permutation = layout.canonical(slot.shape, [*read.batch, *read.k, *read.n])
    batch, k, n = (math.prod(f.size for f in part) for part in (read.batch, read.k, read.n))
    return WeightSpec(
        path=slot.path,
        param=slot.param,
        index=slot.index,
        shape=slot.shape,
        permutation=permutation,
        batch=batch,
        k=k,
        n=n,
        group=group,
        uses=uses,
        factors=factors,
    )


def _decisive(reads: list[Read]) -> Read:
    """The read whose view is the weight's: the first matmul or convolution, else the first lookup."""
    return min(reads, key=lambda read: read.kind == "embedding")


def _refused(
    params: Mapping[str, jax.ShapeDtypeStruct], by_slot: Mapping[Slot, list[Read]], notes: list[Note]
) -> dict[str, str]:
    """Parameters that are read but cannot be weights, and why."""
    refused = {note.slot.param: note.reason for note in reversed(notes) if note.hidden}
    sliced: dict[str, list[int]] = {}
    for slot, reads in by_slot.items():
        name = slot.param
        matmuls = [read for read in reads if read.kind != "embedding"]
        if reason := _plain(params[name]):
            refused[name] = reason
        elif len(slot.shape) < 2:
            refused.setdefault(name, "vector")
        elif sliced.setdefault(name, axes := _sliced(slot.index)) != axes:
            reason = (
                "read both as a whole and in slices" if [] in (sliced[name], axes) else "read in slices of two kinds"
            )
            refused.setdefault(name, reason)
        elif len({(read.batch, read.k, read.n) for read in matmuls or reads}) > 1:
            refused.setdefault(name, "read twice, with different axes contracted")
    return refused


def _skipped(
    params: Mapping[str, jax.ShapeDtypeStruct], kept: Iterable[Slot], refused: Mapping[str, str], notes: list[Note]
) -> Iterable[Skipped]:
    claimed: dict[str, set[tuple[int | None, ...]]] = {}
    for slot in kept:
        claimed.setdefault(slot.param, set()).add(slot.index)
    noted = {note.slot.param: note for note in reversed(notes)}
    for name, param in params.items():
        note = noted.get(name)
        if name not in claimed:
            reason = note.reason if note else "never read"
            if note and note.slot.index and len(note.slot.shape) < 2:
                reason = "vector in every slice"
            yield Skipped(name, _plain(param) or refused.get(name) or reason)
            continue
        if note:
            yield Skipped(name, f"in part: also {note.reason}")
        pattern = next(iter(claimed[name]))
        sizes = [[None] if at is None else range(size) for at, size in zip(pattern, param.shape, strict=False)]
        missing = [index for index in itertools.product(*sizes) if index not in claimed[name]]
        if missing:
            slices = ", ".join(map(show_index, missing))
            yield Skipped(name, f"in part: the slices {slices} reach no matmul")


def _plain(param: jax.ShapeDtypeStruct) -> str | None:
    """The reason that shape or dtype alone give."""
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return f"not floating point ({param.dtype})"
    if 0 in param.shape:
        return "empty"
    return {0: "scalar", 1: "vector"}.get(len(param.shape))


def _sliced(index: tuple[int | None, ...]) -> list[int]:
    return [axis for axis, at in enumerate(index) if at is not None]


def _groups(uses: Mapping[Slot, list[Use]]) -> dict[Slot, str]:
    """Name of the fused group of every weight: weights that multiply the same input, directly or through a third."""
    leader = {slot: slot for slot in uses}

    def find(slot: Slot) -> Slot:
        return slot if leader[slot] == slot else find(leader[slot])

    first: dict[str, Slot] = {}
    for slot, slot_uses in uses.items():
        for use in slot_uses:
            if use.kind != "embedding":
                leader[find(slot)] = find(first.setdefault(use.input, slot))
    members: dict[Slot, list[str]] = {}
    for slot in uses:
        members.setdefault(find(slot), []).append(slot.path)
    return {slot: group_name(members[find(slot)]) for slot in uses}


def group_name(paths: list[str]) -> str:
    """A name for weights that share an input: `layers.0.attn.{q,k,v}_proj.kernel`; a weight alone keeps its path."""
    columns = list(zip(*(path.split(".") for path in paths), strict=False))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(paths) == 1:
        return paths[0]
    if len({path.count(".") for path in paths}) > 1 or len(differing) != 1:
        return "{" + ",".join(paths) + "}"
    words = [name.split("_") for name in columns[differing[0]]]
    shortest = min(map(len, words))
    same = lambda i: len({word[i] for word in words}) == 1
    head = next((i for i in range(shortest) if not same(i)), shortest - 1)
    tail = next((i for i in range(shortest - head) if not same(-1 - i)), shortest - head - 1)
    middle = ",".join("_".join(word[head : len(word) - tail]) for word in words)
    part = "_".join([*words[0][:head], "{" + middle + "}", *words[0][len(words[0]) - tail :]])
    return ".".join(part if i == differing[0] else column[0] for i, column in enumerate(columns))
