"""The search for all non-dominated points: guess a band, solve within it, certify, widen where it fails.

Method. Nemhauser and Ullmann 1969 (dominance), applied to a binary tree of groups instead of one group at a time; the
states of a node are confined to a band above its convex hull (`tree.py`), the multiple-choice form of the core of
Pisinger 1995. The band is right in hull interval j if no choice with a size there can lie above it and still be
non-dominated. Whatever the first band, the points found are feasible, so their staircase U is an upper bound: a
non-dominated choice of size s has loss <= U(s). If U stays within the band over interval j, the interval is
*certified*: every non-dominated point in it has been found. Otherwise it is solved again with a wider one, at most U.

Differences from the papers. All budgets at once; a limit for each hull interval instead of one core; integers instead
of floats for the losses. It fails by memory, loudly, if the frontier itself is enormous (losses exactly proportional
to incommensurable sizes).
"""

import dataclasses
import itertools

import numpy as np

from mpq.allocate.hull import group_hulls
from mpq.allocate.merge import merge, non_dominated
from mpq.allocate.tree import SLACK, Node, join, keep_within, narrow, narrow_beside_group
from mpq.types import MpqError

# Measured on the shapes of experiments/bench_allocate.py; none of them changes the answer.
# The first band is as high as the cost of the so-many-th cheapest deviation of one group from the hull, ...
FIRST_BAND = 30
FIRST_BAND_GROUPS = 6  # ... and one more for every so many groups
WIDEN = 2.0  # by this factor it grows where it was too low, and to at least NARROWEST of what the staircase would need
NARROWEST = 1 / 256
LARGE = 6.0  # a group this much larger than the mean of the smaller ones is split off at the top of the tree
MOST_LARGE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
    """All non-dominated points, relative to the smallest choice, and the trees that hold their choices.

    Attributes:
      size, loss: `int64[P]`; size in units of `unit` bits, ascending; loss in fixed point, strictly descending.
      unit: greatest common divisor of all size differences, bits.
      start: `int64[G]`, the smallest choice.
      roots: one tree for each pass.
      tree, state: `int64[P]`, which root, and which of its states.
    """

    size: np.ndarray
    loss: np.ndarray
    unit: int
    start: np.ndarray
    roots: tuple[Node, ...]
    tree: np.ndarray
    state: np.ndarray

    def choices(self, points: np.ndarray) -> np.ndarray:
        """`int64[len(points), G]`: option of every group at each of the points."""
        result = np.tile(self.start, (len(points), 1))
        for index, root in enumerate(self.roots):
            at = np.flatnonzero(self.tree[points] == index)
            todo = [(root, self.state[points[at]])]
            while todo:
                node, state = todo.pop()
                if node.left is None or node.right is None:
                    result[at, node.group] = node.first[state]
                else:
                    todo += [(node.left, node.first[state]), (node.right, node.second[state])]
        return result


def search(names: tuple[str, ...], size: np.ndarray, loss: np.ndarray, allowed: np.ndarray, max_pairs: int) -> Points:
    """All non-dominated sums of one option per group.

    Args:
      names: of the groups; they order groups of equal size range where ties are broken.
      size: `int64[G, S]`.
      loss: `int64[G, S]`, fixed point.
      allowed: `bool[G, S]`.
      max_pairs: most pairs of states that one merge may hold.

    Raises:
      MpqError: `max_pairs` was exceeded.
    """
    leaves, start, unit = _leaves(names, size, loss, allowed)
    zero = np.zeros(1, np.int64)
    if not leaves:
        return Points(zero, zero, 1, start, (), zero - 1, zero)
    template = _build(leaves)
    limit = _first_limit(template, leaves)
    found_size, found_loss = template.x, template.y  # hull vertices are feasible
    open_, roots, parts = np.ones(len(limit), np.bool_), [], []
    while open_.any():
        root = _fresh(template)
        root.limit = np.where(open_, limit, -1.0)
        try:
            _solve(root, (found_size, found_loss), max_pairs)
        except OverflowError:
            raise MpqError(
                f"the frontier needs more than {max_pairs} candidate points at once: raise max_pairs, use fewer "
                "schemes, or solve single budgets with the lagrangian solver"
            ) from None
        found_size, found_loss = np.append(found_size, root.size), np.append(found_loss, root.loss)
        keep = non_dominated(found_size, found_loss, lambda at: at)
        found_size, found_loss = found_size[keep], found_loss[keep]
        need = _staircase_height(root, found_size, found_loss)
        certified = open_ & (need <= limit)
        states = np.flatnonzero(certified[_interval(root, root.size)])
        parts.append((root.size[states], root.loss[states], np.full(len(states), len(roots)), states))
        roots.append(root)
        open_ = open_ & ~certified
        limit = np.minimum(need, np.maximum(WIDEN * limit, NARROWEST * need))
    point_size, point_loss, tree, state = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = non_dominated(point_size, point_loss, lambda at: at)
    return Points(point_size[keep], point_loss[keep], unit, start, tuple(roots), tree[keep], state[keep])


def _leaves(
    names: tuple[str, ...], size: np.ndarray, loss: np.ndarray, allowed: np.ndarray
) -> tuple[list[Node], np.ndarray, int]:
    """Groups with a real choice, largest size range first; the smallest choice of all groups; the unit of size."""
    hulls = group_hulls(size, loss, allowed)
    bounds = np.searchsorted(hulls.group, np.arange(len(size) + 1))
    leaves, unit = [], 0
    for group, (low, high) in enumerate(itertools.pairwise(bounds)):
        if low == high:
            continue
        options = np.flatnonzero(allowed[group])
        options = options[
            non_dominated(size[group, options], loss[group, options], lambda at, options=options: options[at])
        ]
        vertices = lambda steps, low=low, high=high: np.concatenate([[0], np.cumsum(steps[low:high])])
        leaf = Node(None, None, group, vertices(hulls.width), vertices(-hulls.drop), hulls.slope[low:high])
        first = hulls.start[group]
        leaf.size, leaf.loss = size[group, options] - size[group, first], loss[group, options] - loss[group, first]
        leaf.first = options.astype(np.int32)
        unit = int(np.gcd(unit, np.gcd.reduce(leaf.size)))
        leaves.append(leaf)
    for leaf in leaves:
        leaf.size, leaf.x, leaf.slope = leaf.size // unit, leaf.x // unit, leaf.slope * unit
    return sorted(leaves, key=lambda leaf: (-leaf.x[-1], names[leaf.group])), hulls.start, unit


def _build(leaves: list[Node]) -> Node:
    """A tree over the leaves in order: halves of equal size range, each outstandingly large group alone at the top.

    Beside a large group the hull is a poor bound; alone at the top, its few options are told apart
    (`narrow_beside_group`).
    """
    weight = np.array([leaf.x[-1] for leaf in leaves], np.float64)
    total = np.concatenate([[0.0], np.cumsum(weight)])

    def tree(low: int, high: int) -> Node:
        if high - low == 1:
            return leaves[low]
        middle = int(np.clip(np.searchsorted(total, (total[low] + total[high]) / 2), low + 1, high - 1))
        return join(tree(low, middle), tree(middle, high))

    large = 0
    while large < min(MOST_LARGE, len(leaves) - 1) and weight[large] > LARGE * weight[large + 1 :].mean():
        large += 1
    root = tree(large, len(leaves))
    for leaf in reversed(leaves[:large]):
        root = join(leaf, root)
    return root


def _fresh(node: Node) -> Node:
    """A copy of the tree whose limits and states can be set."""
    if node.left is None or node.right is None:
        return dataclasses.replace(node)
    return Node(_fresh(node.left), _fresh(node.right), -1, node.x, node.y, node.slope)


def _solve(root: Node, ceiling: tuple[np.ndarray, np.ndarray], max_pairs: int) -> None:
    """Limits from the root down, then states from the leaves up."""
    order = [root]
    for node in order:
        if node.left is None or node.right is None:
            continue
        for child, sibling in ((node.left, node.right), (node.right, node.left)):
            narrow(node, child)
            if sibling.left is None and child.left is not None:
                narrow_beside_group(node, child, sibling.size, sibling.loss)
            order.append(child)
    for node in reversed(order):
        if node.left is None:
            keep_within(node)
        else:
            merge(node, ceiling if node is root else None, max_pairs)


def _first_limit(root: Node, leaves: list[Node], samples: int = 128) -> np.ndarray:
    """`float64[H]`, a first band: the FIRST_BAND-th smallest reduced cost of a single option, at a sample of slopes."""
    intervals = len(root.x) - 1
    sample = np.unique(np.linspace(0, intervals - 1, min(intervals, samples)).astype(np.int64))
    slope = root.slope[sample][:, None]
    costs = []
    for leaf in leaves:
        value = leaf.loss + slope * leaf.size
        costs.append(np.sort(value - value.min(axis=1, keepdims=True), axis=1)[:, 1:])
    cost = np.concatenate(costs, axis=1)
    rank = min(FIRST_BAND + len(leaves) // FIRST_BAND_GROUPS, cost.shape[1]) - 1
    band = np.partition(cost, rank, axis=1)[:, rank]
    band = np.maximum(band, np.append(band[1:], band[-1]))
    return band[np.searchsorted(sample, np.arange(intervals), side="right") - 1]


def _interval(node: Node, size: np.ndarray) -> np.ndarray:
    """Hull interval that holds each size: closed below, open above, the last closed."""
    return np.clip(np.searchsorted(node.x, size, side="right") - 1, 0, len(node.x) - 2)


def _staircase_height(root: Node, size: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """`float64[H]`: how far the staircase of known points rises above the hull within each interval, at integer sizes.

    It is highest just before a step; given with the allowance for rounding that `tree.py` makes everywhere. Hull
    vertices are among the points, so every step ends in the interval where it begins.
    """
    end = np.append(size[1:] - 1, size[-1])
    j = _interval(root, end)
    terms = (loss - root.y[j]).astype(np.float64), root.slope[j] * (end - root.x[j])
    result = np.zeros(len(root.x) - 1)
    np.maximum.at(result, j, terms[0] + terms[1] + SLACK * (np.abs(terms[0]) + np.abs(terms[1])))
    return result
