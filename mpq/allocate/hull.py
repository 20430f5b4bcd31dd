"""Lower convex hulls of the options of each group: the linear relaxation of the multiple-choice knapsack.

Sinha and Zoltners 1979, *The multiple-choice knapsack problem*: the relaxation takes the hull segments of all groups
in the order of their efficiency, loss saved per bit; at most one segment is cut.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Hull segments of all groups, from the smallest option of a group to its least loss.

    Attributes:
      start: `int64[G]`, option of the smallest size (of those the least loss, of those the first).
      group: `int64[H]`, in ascending order of (group, size).
      option: `int64[H]`, option at the segment's upper end.
      width: `int64[H]`, size added, positive.
      drop: `int64[H]`, loss saved, positive.
      slope: `float64[H]`, loss saved per unit of size; never ascends within a group, whatever the rounding.
    """

    start: np.ndarray
    group: np.ndarray
    option: np.ndarray
    width: np.ndarray
    drop: np.ndarray
    slope: np.ndarray

    def cut(self, room: int) -> int | None:
        """The segment that the relaxation cuts, with `room` left above the smallest options; None: all of them fit."""
        order, fits = self.taken(room)
        return int(order[fits]) if fits < len(order) else None

    def taken(self, room: int) -> tuple[np.ndarray, int]:
        """Segments in the order in which the relaxation takes them, and how many of the first fit into `room`."""
        order = np.argsort(-self.slope, kind="stable")
        return order, int(np.searchsorted(np.cumsum(self.width[order]), room, side="right"))


def group_hulls(size: np.ndarray, loss: np.ndarray, allowed: np.ndarray) -> Segments:
    """Hulls of all groups at once, by wrapping: the next vertex is the one that saves most loss per bit.

    Args:
      size: `int64[G, S]`.
      loss: `int64[G, S]`, fixed point.
      allowed: `bool[G, S]`, at least one in every row.
    """
    rows = np.arange(len(size))
    largest = np.iinfo(np.int64).max
    smallest = np.where(allowed, size, largest)
    least = smallest == smallest.min(axis=1, keepdims=True)
    start = np.where(least, loss, largest).argmin(axis=1)
    parts: list[tuple[np.ndarray, ...]] = []
    vertex, last = start, np.full(len(size), np.inf)
    for _ in range(size.shape[1] - 1):
        width = size - size[rows, vertex][:, None]
        drop = loss[rows, vertex][:, None] - loss
        ahead = allowed & (width > 0) & (drop > 0)
        slope = np.where(ahead, drop / np.where(ahead, width, 1), -1.0)
        best = slope.max(axis=1)
        steepest = ahead & (slope == best[:, None])
        last = np.minimum(last, best)
        active = np.flatnonzero(ahead.any(axis=1))
        if not len(active):
            break
        option = np.where(steepest, width, largest).argmin(axis=1)
        chosen = option[active]
        parts.append((active, chosen, width[active, chosen], drop[active, chosen], last[active]))
        vertex = np.where(ahead.any(axis=1), option, vertex)
    if not parts:
        empty = np.zeros(0, np.int64)
        return Segments(start, empty, empty, empty, empty, np.zeros(0))
    group, option, width, drop, slope = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(group, kind="stable")
    return Segments(start, group[order], option[order], width[order], drop[order], slope[order])
