"""Weights, activations and the KV cache in one knapsack: candidates are pairs of schemes, and bytes are common.

Weights of a group read one value, which has one scheme: the candidates of a group are pairs (weight scheme, activation
scheme), the loss of a pair the sum of both. A key or value projection's part of the cache is a group of its own, whose
size is what it takes at a context. So a byte goes to where it buys most, be it a weight or the cache.

    loss(w, a) = loss(w) + loss(a)      size(w, a) = size(w) + range(a)      BOPs(w, a) = MACs x bits(w) x bits(a)
    loss(cache at c) from its table     size(cache at c) = context x sequences x bits a token at c

Groups whose weights read several values (a tied weight, a convolution beside its shortcut) give all of these one
scheme. Activations that stay in floating point count 16 bits, and so does a cache that does.
Fails on: what losses of single rows cannot see. Errors of weights and activations of one product are nearly
independent, but those of many rows add up to more than their sum where they are large.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import ActivationScheme
from mpq.activations.table import ActivationTable
from mpq.allocate import Constraint, Problem
from mpq.grids import NumberFormat
from mpq.types import MpqError, Scheme, WeightSpec

FLOAT_BITS = 16
"""Of activations and of the cache where they stay in floating point."""

CACHE = " cache"
"""After the path of a projection: its part of the KV cache, among the paths of a solution."""


@dataclasses.dataclass(frozen=True)
class JointScheme:
    """One column of the problem: schemes of weights and of what they read, or of a part of the cache alone.

    Attributes:
      weight: of the weights; None in a column of the cache.
      activation: of what they read, or of the cache; None: floating point.
    """

    weight: Scheme | None
    activation: ActivationScheme | None

    def __str__(self) -> str:
        beside = "float" if self.activation is None else str(self.activation)
        return f"cache {beside}" if self.weight is None else f"{self.weight}+{beside}"

    @property
    def format(self) -> NumberFormat:
        """The number format of the weights."""
        assert self.weight is not None  # nobody asks for that of a cache
        return self.weight.format

    @property
    def activation_bits(self) -> int:
        """Of one value."""
        return FLOAT_BITS if self.activation is None else self.activation.bits


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """The problem, and the way from its solutions back to plans.

    Attributes:
      problem: for any solver; its schemes are `JointScheme`s.
      rows: path of a weight, or of a projection with `CACHE` behind it -> the rows that follow its scheme.
    """

    problem: Problem
    rows: Mapping[str, tuple[ActivationSpec, ...]]

    def weights(self, choice: Mapping[str, Any]) -> dict[str, Scheme]:
        """Path -> scheme of the weight, of a solution's choice."""
        return {path: scheme.weight for path, scheme in choice.items() if scheme.weight is not None}

    def activations(self, choice: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What a plan says of the rows that are rounded, of a solution's choice."""
        chosen = {
            row.path: RoundedActivation(row, scheme.activation).to_json()
            for path, scheme in choice.items()
            if scheme.activation is not None
            for row in self.rows[path]
        }
        return chosen

    def cache_bits(self, choice: Mapping[str, Any]) -> int:
        """Bits of the cache, of a solution's choice."""
        index = self.problem.by_group(choice)
        groups = [i for i, group in enumerate(self.problem.members) if group[0].path.endswith(CACHE)]
        return sum(int(self.problem.size_bits[i, index[i]]) for i in groups)

    def bops(self, limit: float) -> Constraint:
        """At most `limit` bit operations in one evaluation, by the bits of both factors.

        Raises:
          MpqError: the limit is not positive.
        """
        if not limit >= 1:
            raise MpqError(f"limit of BOPs {limit!r} is not a positive number: give for instance 1000")
        cost = np.zeros(self.problem.loss.shape, np.int64)
        for row, column in np.argwhere(self.problem.allowed):
            scheme: Any = self.problem.schemes[column]
            if scheme.weight is not None:
                bits = scheme.format.bits * scheme.activation_bits
                cost[row, column] = bits * sum(spec.macs for spec in self.problem.members[row])
        return Constraint("BOPs", "bit operations", cost, int(limit))


Pairs = Callable[[WeightSpec, Scheme, ActivationScheme | None], bool]
"""Whether a weight may have a scheme while its input has another, or stays in floating point."""


def joint_problem(
    weights: Problem,
    activations: ActivationTable | None,
    cache: ActivationTable | None,
    tokens: int,
    pairs_allowed: Pairs = lambda spec, scheme, activation: True,
) -> Joint:
    """The problem that weights, activations and the cache pose together.

    Args:
      weights: of the weights alone, with its pins and rules.
      activations: losses of the inputs of weights; None: they stay in floating point.
      cache: losses of the parts of the KV cache; None: it is not counted.
      tokens: that the cache holds: context times sequences.
      pairs_allowed: of the schemes of a weight and its input.

    Raises:
      MpqError: `tokens` is not positive, a row is of another model, or a weight is left no pair.
    """
    if cache is not None and tokens < 1:
        raise MpqError(f"a cache of {tokens} tokens: give a context and sequences of 1 or more")
    schemes = None if activations is None else (None, *activations.schemes)
    pairs = [JointScheme(w, a) for w, a in itertools.product(weights.schemes, schemes or (None,))]
    cached = [] if cache is None else [JointScheme(None, a) for a in (None, *cache.schemes)]
    columns = len(pairs) + len(cached)
    count = len(weights.names) + (0 if cache is None else len(cache.activations))
    loss, variance = np.zeros((count, columns)), np.zeros((count, columns))
    size, allowed = np.zeros((count, columns), np.int64), np.zeros((count, columns), np.bool_)
    every = len(schemes or (None,))
    rows = _rows_of_groups(weights, activations)
    for group, read in enumerate(rows):
        repeat = lambda array, group=group: np.repeat(array[group], every)
        mean, squares, bits = _of_rows(read, activations)
        loss[group, : len(pairs)] = repeat(weights.loss) + np.tile(mean, len(weights.schemes))
        variance[group, : len(pairs)] = repeat(weights.variance) + np.tile(squares, len(weights.schemes))
        size[group, : len(pairs)] = repeat(weights.size_bits) + np.tile(bits, len(weights.schemes))
        alone = np.arange(len(pairs)) % every == 0  # a group that reads no row of the table has no choice of one
        allowed[group, : len(pairs)] = repeat(weights.allowed) & (alone | bool(read))
        allowed[group, : len(pairs)] &= _taken(pairs, weights.members[group], read, pairs_allowed)
        if not allowed[group].any():
            raise MpqError(
                f"no scheme of {weights.names[group]} goes with one of its inputs for this runtime: score more schemes "
                "of either, bf16 for weights whose inputs have no losses"
            )
    names, members = list(weights.names), list(weights.members)
    of = {
        spec.path: tuple(row for _, row in read) for group, read in enumerate(rows) for spec in weights.members[group]
    }
    for number, row in enumerate(() if cache is None else cache.activations):
        assert cache is not None
        group = len(weights.names) + number
        loss[group, len(pairs) :] = [0.0, *cache.loss_increase[number]]
        variance[group, len(pairs) :] = [0.0, *cache.stderr[number] ** 2]
        per_token = [row.values * FLOAT_BITS, *(row.size_bits(scheme) for scheme in cache.schemes)]
        held = [0, *(RoundedActivation(row, scheme).range_bits for scheme in cache.schemes)]
        size[group, len(pairs) :] = [tokens * bits + beside for bits, beside in zip(per_token, held, strict=True)]
        allowed[group, len(pairs) :] = True
        path = row.path + CACHE
        names.append(path)
        members.append((WeightSpec(path, "", (), (), (), 0, 0, 0, path, ()),))
        of[path] = (row,)
    paths = (*weights.paths, *(name for name in names if name.endswith(CACHE)))
    problem: Any = (tuple(names), tuple(members), (*pairs, *cached), loss, variance, size, allowed, paths)
    return Joint(Problem(*problem, overhead_bits=weights.overhead_bits), of)


def _rows_of_groups(weights: Problem, table: ActivationTable | None) -> list[list[tuple[int, ActivationSpec]]]:
    """For every group, number and row of the values that its weights read.

    Raises:
      MpqError: a row is read by weights of two groups, or of none.
    """
    found: list[list[tuple[int, ActivationSpec]]] = [[] for _ in weights.names]
    group_of = {spec.path: group for group, members in enumerate(weights.members) for spec in members}
    for number, row in enumerate(() if table is None else table.activations):
        groups = {group_of.get(path) for path in row.weights}
        if len(groups) != 1 or None in groups:
            raise MpqError(
                f"activation {row.path} is read by no single group of weights of the sensitivity table: score both of "
                "the same model"
            )
        found[groups.pop() or 0].append((number, row))
    return found


def _taken(
    pairs: Sequence[JointScheme],
    members: Sequence[WeightSpec],
    read: list[tuple[int, ActivationSpec]],
    pairs_allowed: Pairs,
) -> np.ndarray:
    """`bool[pairs]`: those that every weight of a group may have; only inputs with losses are rounded."""
    rounded, taken = {path for _, row in read for path in row.weights}, np.zeros(len(pairs), np.bool_)
    for column, pair in enumerate(pairs):
        assert pair.weight is not None  # that of a cache is no pair
        by = [pair.activation if spec.path in rounded else None for spec in members]
        taken[column] = all(pairs_allowed(spec, pair.weight, a) for spec, a in zip(members, by, strict=True))
    return taken


def _of_rows(
    read: list[tuple[int, ActivationSpec]], table: ActivationTable | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, variance and stored bits of the rows of a group, floating point first and then every scheme."""
    if table is None or not read:
        columns = 1 if table is None else 1 + len(table.schemes)
        return np.zeros(columns), np.zeros(columns), np.zeros(columns, np.int64)
    numbers = [number for number, _ in read]
    mean = np.concatenate([[0.0], table.loss_increase[numbers].sum(axis=0)])
    squares = np.concatenate([[0.0], (table.stderr[numbers] ** 2).sum(axis=0)])
    bits = [0, *(sum(RoundedActivation(row, scheme).range_bits for _, row in read) for scheme in table.schemes)]
    return mean, squares, np.array(bits, np.int64)
