"""Repeated blocks in one row: `layers.{0-79}.mlp.up_proj.kernel` for eighty paths that differ in one number."""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")
_NUMBER = re.compile(r"((?<![^.\[,])\d+(?![^.\],]))")
"""A number that is a whole part of a path: between dots, or an index in brackets."""


def fold(
    rows: Sequence[Row], path: Callable[[Row], str], same: Callable[[Row], Hashable]
) -> list[tuple[str, list[Row]]]:
    """Rows whose paths differ in numbers alone, taken together.

    A folded path stands for exactly its rows: each braced list of numbers is complete with each other one.

    Args:
      rows: in any order.
      path: of a row.
      same: what must be equal for rows to be taken together.

    Returns:
      Folded path and its rows, in the order of their first rows.
    """
    items: list[tuple[list[str], list[Row]]] = [(_NUMBER.split(path(row)), [row]) for row in rows]
    longest = max((len(parts) for parts, _ in items), default=0)
    for place in range(1, longest, 2):  # numbers are at odd places
        merged: dict[Any, list[tuple[list[str], list[Row]]]] = {}
        for parts, members in items:
            others = (*parts[:place], None, *parts[place + 1 :]) if place < len(parts) else tuple(parts)
            merged.setdefault((others, same(members[0])), []).append((parts, members))
        items = [_merge(group, place) for group in merged.values()]
    return [("".join(parts), members) for parts, members in items]


def mask(path: str) -> str:
    """`path` with `#` for its numbers."""
    return _NUMBER.sub("#", path)


def _merge(group: list[tuple[list[str], list[Any]]], place: int) -> tuple[list[str], list[Any]]:
    parts = list(group[0][0])
    if len(group) > 1:
        parts[place] = "{" + _ranges(sorted(int(other[place]) for other, _ in group)) + "}"
    return parts, [row for _, members in group for row in members]


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
