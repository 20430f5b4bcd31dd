"""Attention heads whose values can be rotated: found by running the model between its weights.

Attention averages values over tokens, with weights that sum to one and that all features of a head share. So a head's
values can be rotated where they are made (columns of v_proj, and its bias) and back where their average is read (rows
of o_proj): R2 of SpinQuant (Liu et al. 2024, arXiv:2405.16406, section 3.2). Query heads that share keys and values
share the rotation.

No name and no shape says which weight makes values, in which of its columns, and how large a head is:

  1. Every output is set to a number of its own, the same for all tokens. Where an average of values is read, these
     numbers come out as they are, and say which column each row reads.
  2. All these columns are set to one random number a token. Rows that read the same sequence of averages belong to one
     head.

What then has to hold is checked with random rotations and random outputs: what is read comes out rotated, within
float32. Fails on: values that are not averaged linearly (a norm of the values), which are left alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.equalize.cut import Cut, Needs, Outputs
from mpq.equalize.orthogonal import Rotation, random_rotation
from mpq.equalize.stream import NOISE
from mpq.trace import sole_input
from mpq.types import Params, WeightSpec

_CODES = 1 << 15
"""Largest number of step 1: float32 averages of it are exact to a hundredth."""


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The values of one attention layer.

    Attributes:
      value: what is read: the averages, of all heads.
      writer: path of the weight that makes the values.
      site: its number in the trace.
      biases: vectors that are added to its output.
      readers: paths of the weights that read the averages.
      columns: `int[groups, features]`, the writer's columns of each head of values.
      rows: `int[heads, features]`, what reads the same features in the same order, head by head.
      group: `int[heads]`, of each, which head of values it is.
    """

    value: str
    writer: str
    site: int
    biases: tuple[str, ...]
    readers: tuple[str, ...]
    columns: np.ndarray
    rows: np.ndarray
    group: np.ndarray

    def rotations(self, key: jax.Array) -> tuple[Rotation, ...]:
        """One for every head of values."""
        groups, features = self.columns.shape
        return tuple(random_rotation(features, jax.random.fold_in(key, group)) for group in range(groups))

    def turn(self, made: np.ndarray, rotations: Sequence[Rotation]) -> np.ndarray:
        """`made[..., columns]` with each head of values rotated."""
        made = np.array(made, np.float64)
        for columns, rotation in zip(self.columns, rotations, strict=True):
            made[..., columns] = rotation(made[..., columns])
        return made

    def turn_read(self, read: np.ndarray, rotations: Sequence[Rotation]) -> np.ndarray:
        """`read[..., rows]` with each head of averages rotated."""
        read = np.array(read, np.float64)
        for rows, group in zip(self.rows, self.group, strict=True):
            read[..., rows] = rotations[group](read[..., rows])
        return read

    def rotate_others(self, params: Params, rotations: Sequence[Rotation]) -> dict[str, jax.Array]:
        """`params` with the biases rotated."""
        turned = {path: jnp.asarray(self.turn(np.asarray(params[path]), rotations)) for path in self.biases}
        return {**params, **{path: bias.astype(params[path].dtype) for path, bias in turned.items()}}

    def rotate(
        self, params: Params, specs: Mapping[str, WeightSpec], rotations: Sequence[Rotation]
    ) -> dict[str, jax.Array]:
        """`params` of the same function, values rotated where they are made and back where they are read."""
        new = self.rotate_others(params, rotations)
        made = self.turn(np.asarray(specs[self.writer].read(params)), rotations)
        new = specs[self.writer].write(new, jnp.asarray(made, jnp.float32))
        for path in self.readers:
            read = self.turn_read(np.asarray(specs[path].read(params)).swapaxes(-1, -2), rotations)
            new = specs[path].write(new, jnp.asarray(read.swapaxes(-1, -2), jnp.float32))
        return new


def find_heads(cut: Cut, params: Params, key: jax.Array) -> tuple[Heads, ...]:
    """All attention layers whose values can be rotated, in the order of execution.

    Args:
      cut: the model between its weights.
      params: its parameters.
      key: of the rotations that are tried.
    """
    outputs = cut.random_outputs(0)
    needs, _ = cut.needs(params, outputs)
    read_by: dict[str, list[str]] = {}
    for spec in cut.traced.weights:
        if spec.batch == 1 and (value := sole_input(spec)) is not None:
            read_by.setdefault(value, []).append(spec.path)
    copied = _copied(cut, params, {name: needs[name] for name in read_by})
    columns, rng, alike = (
        {number: np.unique(columns) for number, columns in copied.values()},
        np.random.default_rng(2),
        outputs,
    )
    for number, made in columns.items():
        matrix = cut.matrix(number, outputs)
        matrix[..., made] = rng.normal(size=(*matrix.shape[:-1], 1))
        alike = cut.with_matrix(number, alike, matrix)
    averages, found = _averages(cut, params, alike, columns), []
    for name, (site, columns) in copied.items():
        if (parts := _parts(averages[name], columns)) is not None:
            writer = cut.traced.sites[site].spec.path
            heads = Heads(name, writer, site, (), tuple(read_by[name]), *parts)
            heads = dataclasses.replace(heads, biases=_biases(cut, params, outputs, heads, needs[name]))
            if _turns(cut, params, outputs, heads, heads.rotations(key)):
                found.append(heads)
    return tuple(found)


def _copied(cut: Cut, params: Params, needs: Mapping[str, Needs]) -> dict[str, tuple[int, np.ndarray]]:
    """Value -> the site whose columns it averages, and which column each feature is of: `int[features]`."""
    sites = cut.traced.sites
    outputs = tuple(jnp.zeros(site.output.shape, site.output.dtype) for site in sites)
    first: dict[int, int] = {}  # of every site, its first code
    for need in needs.values():
        code = 1
        for number in sorted(need.sites):
            spec = sites[number].spec
            if sites[number].use.kind == "matmul" and spec.batch == 1 and len(spec.uses) == 1 and number not in first:
                first[number] = code
                codes = np.arange(code, code + spec.n) % _CODES
                shape = cut.matrix(number, outputs).shape
                outputs = cut.with_matrix(number, outputs, np.broadcast_to(codes, shape))
                code += spec.n
    reads, found = _averages(cut, params, outputs, {n: np.arange(sites[n].spec.n) for n in first}), {}
    for name, need in needs.items():
        codes = np.round(reads[name][0])
        if codes.max() >= _CODES or np.abs(reads[name] - codes).max() > 0.25:
            continue
        for number in sorted(need.sites & first.keys()):
            columns = (codes - first[number]).astype(np.int64)
            if columns.min() >= 0 and columns.max() < sites[number].spec.n:
                found[name] = (number, columns)
    return found


def _averages(cut: Cut, params: Params, outputs: Outputs, columns: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Value -> `[tokens, features]` less what it is where these columns of the outputs are zero: without biases."""
    empty = outputs
    for number, zeroed in columns.items():
        made = cut.matrix(number, outputs)
        made[..., zeroed] = 0.0
        empty = cut.with_matrix(number, empty, made)
    before, after = cut.reads(params, empty), cut.reads(params, outputs)
    return {name: after[name][0] - before[name][0] for name in after}


def _parts(averages: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Columns of each head of values, rows of each head that reads one, and which; None if they are no heads."""
    head = np.full(len(columns), -1)
    for feature in range(len(columns)):
        if head[feature] < 0:
            off = np.abs(averages - averages[:, feature : feature + 1]).max(axis=0)
            head[(head < 0) & (off <= 1e-4 * np.abs(averages[:, feature]).max())] = feature
    members = [np.flatnonzero(head == first) for first in np.unique(head)]
    rows = [m[np.argsort(columns[m], kind="stable")] for m in members]
    groups = sorted({tuple(columns[r]) for r in rows})
    sizes = {len(group) for group in groups}
    distinct = sum(map(len, groups)) == len(set().union(*groups)) and all(len(set(g)) == len(g) for g in groups)
    if len(sizes) != 1 or sizes == {1} or not distinct:
        return None
    return np.array(groups), np.array(rows), np.array([groups.index(tuple(columns[r])) for r in rows])


def _biases(cut: Cut, params: Params, outputs: Outputs, heads: Heads, need: Needs) -> tuple[str, ...]:
    """Vectors that change what is read just as the writer's own output does."""
    made = cut.matrix(heads.site, outputs)
    shift = np.zeros(made.shape[-1])
    shift[heads.columns] = np.random.default_rng(3).normal(size=heads.columns.shape)
    want = cut.reads(params, cut.with_matrix(heads.site, outputs, made + shift))[heads.value]
    found = []
    for path in sorted(need.params):
        if params[path].shape == shift.shape:
            bias = jnp.asarray(np.asarray(params[path]) + shift, params[path].dtype)
            got = cut.reads({**params, path: bias}, outputs)[heads.value]
            if np.allclose(got, want, rtol=0, atol=NOISE * float(np.abs(want).max())):
                found.append(path)
    return tuple(found)


def _turns(cut: Cut, params: Params, outputs: Outputs, heads: Heads, rotations: Sequence[Rotation]) -> bool:
    """Whether what is read turns with the values."""
    turned = cut.with_matrix(heads.site, outputs, heads.turn(cut.matrix(heads.site, outputs), rotations))
    want = heads.turn_read(cut.reads(params, outputs)[heads.value], rotations)
    got = cut.reads(heads.rotate_others(params, rotations), turned)[heads.value]
    noise = NOISE * float(np.sqrt(heads.columns.shape[1])) * float(np.abs(want).max())
    return bool(np.abs(got - want).max() <= noise)
