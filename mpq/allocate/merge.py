"""Non-dominated states of a node from those of its two children, and of a plain list.

The pairs of states are not enumerated: for each hull interval of the node and each left state within the limit there,
the right states that bring the total size into the interval are one contiguous run, and the node's limit sieves the
run.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mpq.allocate.tree import SLACK, Node

CHUNK = 1 << 17  # pairs at once: what stays in the cache


def merge(node: Node, ceiling: tuple[np.ndarray, np.ndarray] | None = None, max_pairs: int | None = None) -> None:
    """Sets the states of `node` from those of its children.

    Args:
      node: both children are solved; limits are set.
      ceiling: sizes and losses of known feasible choices, ascending; states above it are not wanted (at the root only).
      max_pairs: give up beyond so many pairs within the band.

    Raises:
      OverflowError: more than `max_pairs` pairs.
    """
    left, right = node.left, node.right
    assert left is not None
    assert right is not None
    rows = _rows(node, left, right)
    total = np.concatenate([[0], np.cumsum(rows.count)])
    parts, kept, start = [], 0, 0
    while start < len(rows.count) or not parts:
        stop = max(start + 1, int(np.searchsorted(total, total[start] + CHUNK, side="right")) - 1)
        part = _pairs(rows, start, stop, right)
        sieved = _undominated_by_buckets(part[0], part[1])
        part = tuple(column[sieved] for column in part)
        if ceiling is not None:
            under = part[1] <= ceiling[1][np.searchsorted(ceiling[0], part[0], side="right") - 1]
            part = tuple(column[under] for column in part)
        parts.append(part)
        start, kept = stop, kept + len(part[0])
        if max_pairs is not None and kept > max_pairs:
            raise OverflowError
    size, loss, first, second = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = non_dominated(size, loss, lambda at: left.order()[first[at]] * len(right.size) + right.order()[second[at]])
    node.size, node.loss = size[keep], loss[keep]
    node.first, node.second = first[keep].astype(np.int32), second[keep].astype(np.int32)
    node._order = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Pairs (interval j of the node, state a of its left child), each with a run of right states of fitting size.

    Attributes:
      a: `int64[R]`; size, loss: of a, relative to the hull vertex where interval j begins.
      slope, limit: `float64[R]`, of interval j; the limit with its allowance for rounding.
      low, count: `int64[R]`, the run.
      x, y: `int64[R]`, the vertex.
    """

    a: np.ndarray
    size: np.ndarray
    loss: np.ndarray
    slope: np.ndarray
    limit: np.ndarray
    low: np.ndarray
    count: np.ndarray
    x: np.ndarray
    y: np.ndarray


def _rows(node: Node, left: Node, right: Node) -> _Rows:
    """All rows whose reduced cost, without the right state's, is within the limit of j."""
    assert left.reach is not None
    assert right.reach is not None
    active = np.flatnonzero(node.limit >= 0)
    low = np.searchsorted(left.size, left.x[left.reach.low[active]], side="left")
    high = np.searchsorted(left.size, left.x[left.reach.high[active]], side="right")
    row, a = expand(low, high - low)
    j = active[row]
    vertex, slope = left.reach.vertex[j], node.slope
    terms = (left.loss[a] - left.y[vertex]).astype(np.float64), slope[j] * (left.size[a] - left.x[vertex])
    keep = terms[0] + terms[1] <= node.limit[j] + SLACK * (np.abs(terms[0]) + np.abs(terms[1]))
    j, a = j[keep], a[keep]
    # Within interval j, |slope * (size - x_j)| is at most the interval's whole drop, and |loss - y_j| at most that
    # and the limit.
    limit = node.limit + SLACK * (2 * slope * np.diff(node.x) + np.abs(node.limit))
    end = node.x[1:].copy()
    end[-1] += 1  # the last interval is closed, the others are open above
    bottom = np.maximum(node.x[j] - left.size[a], right.x[right.reach.low[j]])
    top = np.minimum(end[j] - left.size[a], right.x[right.reach.high[j]] + 1)
    first = np.searchsorted(right.size, bottom, side="left")
    count = np.maximum(np.searchsorted(right.size, top, side="left") - first, 0)
    x, y = node.x[j], node.y[j]
    return _Rows(a, left.size[a] - x, left.loss[a] - y, slope[j], limit[j], first, count, x, y)


def _pairs(rows: _Rows, start: int, stop: int, right: Node) -> tuple[np.ndarray, ...]:
    """Of the pairs of rows `start:stop` those within their limits: size, loss, left state, right state."""
    count = rows.count[start:stop]
    spread = lambda column: np.repeat(column[start:stop], count)
    row, b = expand(rows.low[start:stop], count)
    size = right.size[b]
    size += spread(rows.size)
    loss = right.loss[b]
    loss += spread(rows.loss)
    keep = np.flatnonzero(loss + spread(rows.slope) * size <= spread(rows.limit))
    at = row[keep] + start
    return size[keep] + rows.x[at], loss[keep] + rows.y[at], rows.a[at], b[keep]


def expand(low: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(row, value)` with value running over `low[row] .. low[row] + count[row] - 1`, row by row."""
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(len(row)) - (np.cumsum(count) - count - low)[row]


def non_dominated(size: np.ndarray, loss: np.ndarray, tie_key: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Indices of the states that no other one equals or beats in both, by ascending size.

    Args:
      size: `int64[P]`.
      loss: `int64[P]`.
      tie_key: function from indices to `int64` keys; of states equal in size and loss the least key stays.
    """
    if not len(size):
        return np.zeros(0, np.int64)
    order = np.argsort(size)
    by_size, by_loss = size[order], loss[order]
    first = np.flatnonzero(np.concatenate([[True], by_size[1:] != by_size[:-1]]))
    least = np.minimum.reduceat(by_loss, first)
    better = np.concatenate([[True], least[1:] < np.minimum.accumulate(least)[:-1]])
    segment = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(size))))
    at = np.flatnonzero(better[segment] & (by_loss == least[segment]))
    if len(at) > np.count_nonzero(better):
        keyed = np.lexsort((tie_key(order[at]), segment[at]))
        at = at[keyed]
        at = at[np.concatenate([[True], segment[at][1:] != segment[at][:-1]])]
    return order[at]


def _undominated_by_buckets(size: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the states that no state in a lower bucket of sizes equals or beats: a cheap sieve before sorting."""
    if not len(size):
        return np.zeros(0, np.int64)
    low, high = int(size.min()), int(size.max())
    num_buckets = min(len(size), high - low + 1)
    bucket = ((size - low) * (num_buckets / (high - low + 1))).astype(np.int64)
    least = np.full(num_buckets + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, bucket + 1, loss)
    return np.flatnonzero(loss < np.minimum.accumulate(least)[bucket])
