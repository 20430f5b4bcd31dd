"""A binary tree of groups, and how a proven band above the convex hull carries down it.

A *node* is a set of groups. Its states are the non-dominated (size, loss) sums of one option per group; its hull is
the linear relaxation (`hull.py`). With r_j(state) = loss + slope_j * size - min over all choices of the same (the
reduced cost at the slope of hull interval j), reduced costs of disjoint sets of groups add up and are never negative.
Hence, if every wanted choice of a parent with a size in its interval j has r_j <= limit_j, then the part of that
choice inside a child has r_j <= limit_j too. That carries limits down the tree (`narrow`), and leaves few states to
pair on the way up (`merge.py`).

All sizes and losses are integers and exact. Only reduced costs are floats: each is a difference of exact integers,
rounded within a few parts in 2^53 of its two terms, and every comparison gives way by `SLACK` times these terms, so
that rounding keeps a superfluous state and never drops a needed one.
"""

import dataclasses

import numpy as np

SLACK = 2.0**-46
SMALL = 1 << 15
_NO_FLOATS = np.zeros(0)
_NO_INTS = np.zeros(0, np.int64)


@dataclasses.dataclass(eq=False)
class Node:
    """A set of groups: a leaf (one group) or the union of two nodes. Groups of `left` precede those of `right`.

    Attributes:
      x, y: `int64[H + 1]`, hull vertices (size, loss), both relative to the smallest choice; y falls from 0.
      slope: `float64[H]`, loss saved per unit of size in each hull interval, descending.
      limit: `float64[H]`, bound on the reduced cost of wanted states in each hull interval; negative: none is wanted.
      size, loss: `int64[P]` states, size ascending, loss strictly descending.
      first, second: `int32[P]`, states of the children that a state joins; in a leaf `first` is the option.
    """

    left: "Node | None"
    right: "Node | None"
    group: int
    x: np.ndarray
    y: np.ndarray
    slope: np.ndarray
    limit: np.ndarray = dataclasses.field(default_factory=lambda: _NO_FLOATS)
    size: np.ndarray = dataclasses.field(default_factory=lambda: _NO_INTS)
    loss: np.ndarray = dataclasses.field(default_factory=lambda: _NO_INTS)
    first: np.ndarray = dataclasses.field(default_factory=lambda: _NO_INTS)
    second: np.ndarray = dataclasses.field(default_factory=lambda: _NO_INTS)
    reach: "Reach | None" = None
    _order: np.ndarray | None = None

    def order(self) -> np.ndarray:
        """`int64[P]`: rank of each state when choices are compared scheme by scheme, first group first."""
        if self._order is None:
            if self.left is None or self.right is None:
                key = self.first.astype(np.int64)
            else:
                key = self.left.order()[self.first] * len(self.right.size) + self.right.order()[self.second]
            self._order = np.empty(len(key), np.int64)
            self._order[np.argsort(key)] = np.arange(len(key))
        return self._order


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """Where a child stands at each hull interval j of its parent.

    Attributes:
      vertex: `int64[J]`, hull vertex of the child that is optimal at slope j.
      low, high: `int64[J]`, intervals `low <= i < high` of the child have hull points with reduced cost within the
        limit at j.
    """

    vertex: np.ndarray
    low: np.ndarray
    high: np.ndarray


def join(left: Node, right: Node) -> Node:
    """The union of two nodes, without limits and states: its hull takes all segments in order of slope."""
    width = np.concatenate([np.diff(left.x), np.diff(right.x)])
    drop = np.concatenate([np.diff(left.y), np.diff(right.y)])
    order = np.argsort(np.concatenate([-left.slope, -right.slope]), kind="stable")
    vertices = lambda steps: np.concatenate([[0], np.cumsum(steps[order])])
    slope = np.concatenate([left.slope, right.slope])[order]
    return Node(left, right, -1, vertices(width), vertices(drop), slope)


def narrow(parent: Node, child: Node) -> None:
    """Sets `child.limit` and `child.reach` from `parent.limit`.

    A point of the child's hull in interval i, but not at the vertex that is optimal at slope j, has a reduced cost of
    its own, at least that of the nearer end of the interval. What it leaves of limit_j is left for the child's states.
    """
    slope = parent.slope
    vertex = np.searchsorted(-child.slope, -slope, side="left")
    child.limit = np.full(len(child.x) - 1, -1.0)
    low, high = vertex.copy(), vertex.copy()
    child.reach = Reach(vertex, low, high)
    active = np.flatnonzero(parent.limit >= 0)
    if len(active) * len(child.x) <= SMALL:
        left_over = _left_over(parent, child, slope, vertex, active[:, None], np.arange(len(child.x)))
        each = np.maximum(left_over[:, :-1], left_over[:, 1:])
        within = each >= 0
        if len(active):
            child.limit = np.maximum(each.max(axis=0), -1.0)
            low[active], high[active] = within.argmax(axis=1), within.shape[1] - within[:, ::-1].argmax(axis=1)
        return
    for step, bound in ((-1, low), (1, high)):
        j, offset = active, 0
        while len(j):
            at = vertex[j] + step * offset
            inside = at < len(child.x) - 1 if step > 0 else at > 0
            j, at = j[inside], at[inside]
            left_over = _left_over(parent, child, slope, vertex, j, at)
            within = left_over >= 0
            j, at = j[within], at[within]
            np.maximum.at(child.limit, at if step > 0 else at - 1, left_over[within])
            bound[j] = at + step
            offset += 1


def _left_over(
    parent: Node, child: Node, slope: np.ndarray, vertex: np.ndarray, j: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """Limit of the parent's interval j, less the reduced cost at its slope of the child's hull vertex `at`."""
    base = vertex[j]
    terms = (child.y[at] - child.y[base]).astype(np.float64), slope[j] * (child.x[at] - child.x[base])
    return parent.limit[j] - (terms[0] + terms[1]) + SLACK * (np.abs(terms[0]) + np.abs(terms[1]))


def narrow_beside_group(parent: Node, child: Node, size: np.ndarray, loss: np.ndarray) -> None:
    """Lowers `child.limit` further where the sibling is a single group, whose few options are known.

    With option o beside it, a wanted state of the child at size s has loss <= hull_parent(s + size_o) + limit -
    loss_o. Between vertices of the child the difference to its own hull is convex in s, so the ends of the interval
    bound it.
    """
    best = np.full(len(child.x) - 1, -1.0)
    for option_size, option_loss in zip(size, loss, strict=True):
        at = child.x + option_size
        j = np.clip(np.searchsorted(parent.x, at, side="right") - 1, 0, len(parent.x) - 2)
        dx, dy = at - parent.x[j], parent.y[j] - child.y - option_loss
        terms = dy.astype(np.float64), parent.slope[j] * dx
        gain = terms[0] - terms[1] + SLACK * (np.abs(terms[0]) + np.abs(terms[1]))
        room = _range_max(parent.limit, j[:-1], j[1:] + 1)
        both = room + np.maximum(gain[:-1], gain[1:])
        best = np.maximum(best, np.where(room >= 0, both, -1.0))
    child.limit = np.minimum(child.limit, best)


def _range_max(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maximum of `values[low:high]` for each pair, `low < high`, by a sparse table."""
    level = np.frexp((high - low).astype(np.float64))[1] - 1
    table, result = values, np.empty(len(low))
    for k in range(int(level.max()) + 1):
        at = level == k
        result[at] = np.maximum(table[low[at]], table[high[at] - (1 << k)])
        table = np.append(np.maximum(table[: -1 << k], table[1 << k :]), table[-1 << k :])
    return result


def keep_within(node: Node) -> None:
    """Drops states of a leaf above its limits."""
    j = np.clip(np.searchsorted(node.x, node.size, side="right") - 1, 0, len(node.x) - 2)
    terms = (node.loss - node.y[j]).astype(np.float64), node.slope[j] * (node.size - node.x[j])
    keep = terms[0] + terms[1] <= node.limit[j] + SLACK * (np.abs(terms[0]) + np.abs(terms[1]))
    node.size, node.loss, node.first = node.size[keep], node.loss[keep], node.first[keep]
