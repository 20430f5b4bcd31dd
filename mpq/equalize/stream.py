"""The residual stream of a model, found by running it between its weights: who writes, who reads, which norms.

The features of the stream can be rotated (x to x Q, Q orthogonal) if everything that is added to it is rotated, every
weight that reads it is rotated back, and what lies between commutes with Q: sums, factors that all features of a token
share, and norms but for their scales. A norm's scale g belongs to the features as they were; it goes into the rows of
the weights behind it, diag(g) W, and becomes one; a norm's bias b becomes (b / g) Q.

Nothing is matched by name or form. The largest set of values that share something added to them is taken for the stream
(`mpq.equalize.cut` says what depends on what), and what each parameter does to them is tried out: replaced by zeros, by
ones and by random numbers, a scale and a bias show by what changes. What then has to hold is checked with a random Q
and random numbers in place of what the weights give: every value that is read comes out rotated, within float32. Where
it only does for a Q that keeps the vector of ones, such are used: they commute with the mean that layer normalization
subtracts. (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, section 3.2, moves that mean into the weights instead.)

Fails, and says so: scales on the stream itself, behind which it is added to again (norms after blocks: Gemma 2, BERT);
norms of several layers in one array.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mpq.equalize.cut import Cut, Needs, Outputs
from mpq.equalize.orthogonal import Rotation, identity, random_rotation
from mpq.trace import Site
from mpq.types import Params, WeightSpec

NOISE = 16 * float(np.finfo(np.float32).eps)
"""Times the root of the number of terms: relative error of a value that float32 is taken for."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """What stands between the stream and a value that is read.

    Attributes:
      gain: path of the scale `[width]`, or None.
      unit: the stored number that means a scale of one: 1, or 0 where the scale is 1 + g.
      bias: path of what is added behind it, or None.
    """

    gain: str | None = None
    unit: float = 1.0
    bias: str | None = None

    def scale(self, params: Params) -> np.ndarray | float:
        """The factor of every feature, `float64[width]`."""
        return 1.0 if self.gain is None else np.asarray(params[self.gain], np.float64) + (1.0 - self.unit)


@dataclasses.dataclass(frozen=True)
class Role:
    """What rotation does to a weight: to its rows, behind a norm, or to its columns, or to both."""

    rows: bool
    norm: Norm
    columns: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream that can be rotated.

    Attributes:
      width: its features.
      writers: numbers of the sites whose outputs are added to it.
      norms: value -> what stands before it, of the values that weights read of it.
      added: parameters that are no weights and are added to it: biases, tables of positions.
      keep_ones: only rotations that keep the vector of ones will do.
      roles: weight -> what it is to the stream.
    """

    width: int
    writers: tuple[int, ...]
    norms: Mapping[str, Norm]
    added: tuple[str, ...]
    keep_ones: bool
    roles: Mapping[str, Role]

    def rotate_others(self, params: Params, rotation: Rotation) -> dict[str, jax.Array]:
        """`params` with all that is no weight rotated: scales of norms one, their biases and what is added turned."""
        new = dict(params)
        for norm in self.norms.values():
            if norm.gain is not None:
                new[norm.gain] = jnp.full_like(params[norm.gain], norm.unit)
            if norm.bias is not None:
                new[norm.bias] = _as(rotation(_over(params[norm.bias], norm.scale(params))), params[norm.bias])
        for path in self.added:
            new[path] = _as(rotation(np.asarray(params[path])), params[path])
        return new

    def rotate(self, params: Params, specs: Mapping[str, WeightSpec], rotation: Rotation) -> dict[str, jax.Array]:
        """`params` of the same function, its stream rotated: W Q of what writes it, Q^T diag(g) W of what reads it."""
        new = self.rotate_others(params, rotation)
        for path, role in self.roles.items():
            w = np.asarray(specs[path].read(params), np.float64)
            if role.rows:
                scaled = w.swapaxes(-1, -2) * role.norm.scale(params)
                w = rotation(scaled).swapaxes(-1, -2)
            if role.columns:
                w = rotation(w)
            new = specs[path].write(new, jnp.asarray(w, jnp.float32))
        return new


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a stream cannot be rotated.

    Attributes:
      reason: for a person.
      tied: path of a table that is looked up and is the head, too: with a head of its own the stream could be rotated.
    """

    reason: str
    tied: str | None = None


def find_stream(cut: Cut, params: Params, key: jax.Array) -> Stream | Refusal:
    """The residual stream, if it can be rotated.

    Args:
      cut: the model between its weights.
      params: its parameters.
      key: of the rotation that is tried.
    """
    outputs = cut.random_outputs(0)
    needs, ends = cut.needs(params, outputs)
    names = _largest(needs)
    needs = {name: needs[name] for name in names}
    sites, width = frozenset().union(*(n.sites for n in needs.values())), cut.values[names[0]].spec.k
    if len(names) < 2:
        return Refusal("the model has no residual stream: no two weights read what the same weights wrote")
    if sites & ends.sites:
        return Refusal("the model returns its residual stream itself, whose features must stay as they are")
    if other := next((cut.values[n].spec for n in names if cut.values[n].spec.k != width), None):
        return Refusal(f"`{other.path}` reads {other.k} features of a residual stream of {width}")
    paths = sorted(set().union(*(n.params for n in needs.values())))
    norms, added = _norms(cut, params, outputs, needs, [p for p in paths if params[p].shape == (width,)])
    if isinstance(norms, Refusal):
        return norms
    added += [p for p in paths if params[p].ndim > 1 and params[p].shape[-1] == width]
    writers = tuple(i for i in sorted(sites) if _written(cut.traced.sites[i]) == width)
    wrong = names[0]
    for keep_ones in (False, True):
        stream = Stream(width, writers, norms, tuple(added), keep_ones, {})
        rotation = random_rotation(width, key, keep_ones=keep_ones)
        if (wrong := _unrotated(cut, params, outputs, stream, rotation) or "") == "":
            roles = _roles(cut, params, writers, norms)
            return roles if isinstance(roles, Refusal) else dataclasses.replace(stream, roles=roles)
    before = set().union(*(needs[n].params for n in names[: names.index(wrong)]))
    new = sorted((needs[wrong].params - before) & set(added))
    what = f"`{new[0]}` acts on its features one by one" if new else "what it reads does not turn with its features"
    return Refusal(f"the residual stream cannot be rotated before `{cut.values[wrong].spec.path}`: {what}")


def _largest(needs: Mapping[str, Needs]) -> list[str]:
    """The largest set of values that depend on common sites, in their order."""
    groups: list[tuple[set[int], list[str]]] = []
    for name, need in needs.items():
        touching = [group for group in groups if group[0] & need.sites]
        groups = [group for group in groups if group not in touching]
        sites = set(need.sites).union(*(group[0] for group in touching))
        groups.append((sites, [n for group in touching for n in group[1]] + [name]))
    largest = max(groups, key=lambda group: len(group[1]))[1]
    return [name for name in needs if name in largest]


def _written(site: Site) -> int:
    """Features that a site gives."""
    return site.spec.k if site.use.kind == "embedding" else site.spec.n


def _norms(
    cut: Cut, params: Params, outputs: Outputs, needs: Mapping[str, Needs], vectors: Iterable[str]
) -> tuple[dict[str, Norm] | Refusal, list[str]]:
    """The norm before every value, and the vectors that are none of a norm."""
    forms: dict[str, dict[str, str]] = {}
    biases: dict[str, list[str]] = collections.defaultdict(list)
    gains: dict[str, list[str]] = collections.defaultdict(list)
    for path in vectors:
        trial = _Trial(cut, params, outputs, path)
        forms[path] = {name: trial.form(name) for name, need in needs.items() if path in need.params}
        if set(forms[path].values()) == {"bias"}:
            for name in forms[path]:
                biases[name].append(path)
    units: dict[str, float] = {}
    for path, by_value in forms.items():
        if "gain" not in by_value.values():
            continue
        stream = next((name for name, form in by_value.items() if form != "gain"), None)
        if stream is not None:
            behind = cut.values[stream].spec.path
            return Refusal(
                f"`{path}` scales the residual stream itself, which `{behind}` reads through another norm"
            ), []
        trial = _Trial(cut, params, outputs, path)
        for name in by_value:
            units[path] = trial.unit(name, params, biases[name])
            gains[name].append(path)
    norms = {}
    for name in needs:
        if len(gains[name]) > 1 or len(biases[name]) > 1:
            two = (gains[name] if len(gains[name]) > 1 else biases[name])[:2]
            return Refusal(
                f"`{cut.values[name].spec.path}` reads what `{two[0]}` and `{two[1]}` both scale or shift"
            ), []
        gain, bias = ((found[name] or [None])[0] for found in (gains, biases))
        norms[name] = Norm(gain, units.get(gain or "", 1.0), bias)
        if bias is not None and np.any((norms[name].scale(params) == 0) & (np.asarray(params[bias]) != 0)):
            return Refusal(
                f"`{gain}` is zero where `{bias}` is not: their quotient, which would be kept, is infinite"
            ), []
    used = {path for norm in norms.values() for path in (norm.gain, norm.bias)}
    return norms, [path for path in forms if path not in used]


class _Trial:
    """What a vector does to the values, from running with zeros, ones and random numbers in its place."""

    def __init__(self, cut: Cut, params: Params, outputs: Outputs, path: str) -> None:
        shape = params[path].shape
        self.random = np.random.default_rng(1).uniform(0.5, 2.0, shape).astype(np.float32)
        put = lambda vector: cut.reads({**params, path: jnp.asarray(vector, params[path].dtype)}, outputs)
        self.zeros, self.ones, self.other = put(np.zeros(shape)), put(np.ones(shape)), put(self.random)

    def form(self, name: str) -> str:
        """`bias`: it is added; `gain`: the features are multiplied by it, or by it and one; `other`."""
        zeros, slope = self.zeros[name], self.ones[name] - self.zeros[name]
        size = float(np.abs(self.ones[name]).max() + np.abs(zeros).max())
        if not np.allclose(self.other[name], zeros + slope * self.random, rtol=0, atol=NOISE * size):
            return "other"
        return "bias" if np.allclose(slope, 1.0, rtol=0, atol=NOISE * size) else "gain"

    def unit(self, name: str, params: Params, biases: Iterable[str]) -> float:
        """The number that leaves the features as they are: 1, or 0 if one is added to it."""
        rest = self.zeros[name] - sum(np.asarray(params[path], np.float32) for path in biases)
        return 1.0 if np.abs(rest).max() <= 0.5 * np.abs(self.ones[name] - self.zeros[name]).max() else 0.0


def _roles(cut: Cut, params: Params, writers: Iterable[int], norms: Mapping[str, Norm]) -> dict[str, Role] | Refusal:
    """What every weight is to the stream, the same at all its sites."""
    found: dict[str, set[Role]] = collections.defaultdict(set)
    for number, site in enumerate(cut.traced.sites):
        lookup, writes = site.use.kind == "embedding", number in writers
        norm = None if lookup else norms.get(site.use.input)
        rows = writes if lookup else norm is not None
        if norm is None or np.all(norm.scale(params) == 1.0):
            norm = Norm()
        found[site.spec.path].add(Role(rows, norm, writes and not lookup))
    for path, roles in found.items():
        if len({(role.rows, role.columns) for role in roles}) > 1:
            return Refusal(f"`{path}` reads or writes the residual stream at one place and not at another")
        if len(roles) > 1:
            scale = next(role.norm.gain for role in roles if role.norm.gain is not None)
            return Refusal(f"`{path}` is read both with and without `{scale}`, which therefore cannot go into it", path)
    return {path: role for path, (role,) in found.items() if role.rows or role.columns}


def _unrotated(cut: Cut, params: Params, outputs: Outputs, stream: Stream, rotation: Rotation) -> str | None:
    """The first value that does not turn with what is added to the stream; None where all do."""
    turned = outputs
    for number in stream.writers:
        turned = cut.with_matrix(number, turned, rotation(cut.matrix(number, outputs)))
    before, bare = cut.reads(params, outputs), cut.reads(stream.rotate_others(params, identity(stream.width)), outputs)
    after = cut.reads(stream.rotate_others(params, rotation), turned)
    noise = NOISE * float(np.sqrt(stream.width + len(stream.writers)))
    near = lambda got, want: bool(np.all(_length(got - want) <= noise * _length(want)))
    for name, norm in stream.norms.items():
        if not near(bare[name] * norm.scale(params), before[name].astype(np.float64)):
            return name
        if not near(after[name], rotation(bare[name])):
            return name
    return None


def _length(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis=-1))


def _over(bias: jax.Array, scale: np.ndarray | float) -> np.ndarray:
    """`bias / scale`; 0 over 0 is 0."""
    return np.asarray(bias, np.float64) / np.where(np.asarray(scale) == 0, 1.0, scale)


def _as(value: np.ndarray, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, like.dtype)
