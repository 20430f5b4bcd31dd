"""QEP: every weight makes up for what those before it did to its input (Arai and Ichikawa 2025, arXiv:2504.09629).

Rounded one by one on the original model's inputs, weights of a deep model add their errors up. Here they are rounded in
the order in which they are read, each with what has been rounded so far in front of it. With x the original input and
x' the one that it will really get, over the tokens of the calibration set,

    W' = W + strength (M W - W),    M = E[x' x'^T]^-1 E[x' x^T]

is rounded in the place of W, with the gram of x'. M W is the least-squares fit of the outputs that x gave; less than
strength 1 carries over better to other text.

Weights that read one value are rounded together. An embedding, a convolution or a batch of experts is rounded as it is,
with its statistics on the original inputs; so is a weight that is read inside a branch or a loop.

Cost: two forward passes over the calibration set in all (`mpq.stages`), and the compilation of every stage; memory for
one gram and one product of inputs, and twice for what crosses a cut of the whole calibration set, in a decoder the
residual stream.
Fails on: calibration text that is too short for its inputs (fewer tokens than channels), where M fits noise.

Differences from the paper: one strength for all weights; damping as GPTQ's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import lu_factor, lu_solve

from mpq.calibrate import Read, Weighting, add_product, counted_rows
from mpq.inputs import Dataset
from mpq.progress import track
from mpq.quantize.candidates import Candidates, apply_plan
from mpq.stages import Stages, Values
from mpq.trace import Site, Trace, sole_input
from mpq.types import MpqError, Params, QTensor, Scheme, WeightSpec

SUFFIX = "+propagate"
"""Of the name of a rounding algorithm: used so."""

STRENGTH = 0.5
DAMPING = 0.01
"""Of the mean of the gram's diagonal, added to it."""

_Moments = tuple[jax.Array, ...]
"""Four `float32[1, k, k]`: the gram of x', the product of x' and x, and what each sum lost to rounding, behind it."""


class Propagation:
    """Plans of one model, rounded in the order of execution; in the place of `Candidates` where a plan is made.

    The last plan is kept: whoever measures and then writes it does not have it rounded twice.
    """

    def __init__(
        self,
        traced: Trace,
        candidates: Candidates,
        data: Dataset,
        *,
        batch_size: int,
        strength: float = STRENGTH,
        weightings: Sequence[Weighting] | None = None,
    ):
        """Compute nothing yet.

        Args:
          traced: the model, traced for any batch size.
          candidates: its weights, the rounding algorithm, and the statistics of those that are rounded as they are.
          data: the calibration set.
          batch_size: windows a pass.
          strength: how much of the fit is taken, 0 to 1.
          weightings: of the batches, in order (`mpq.guide.Guide` makes them): every expectation is over tokens so
            weighted. None: all count alike.

        Raises:
          MpqError: the strength is outside of its range.
        """
        if not 0 <= strength <= 1:
            raise MpqError(f"the strength of propagation is {strength}: it must be 0 to 1")
        self._candidates, self._data, self._batch_size, self._strength = candidates, data, batch_size, strength
        self._weightings = weightings
        self._traced = traced.on((batch_size, *data.inputs.shape[1:]))
        self._stages = Stages(self._traced, _first_sites(self._traced))
        self._last: tuple[dict[str, Scheme], dict[str, QTensor]] = ({}, {})

    def choose(self, choice: Mapping[str, Scheme]) -> dict[str, QTensor]:
        """The quantized weights of a plan: path -> scheme. Raises as `Candidates.choose` does."""
        if self._last[0] != choice:
            self._last = dict(choice), self._rounded(choice)
        return {path: self._last[1][path] for path in choice}

    def _rounded(self, choice: Mapping[str, Scheme]) -> dict[str, QTensor]:
        params, rounded = self._candidates.params, dict(self._candidates.params)
        streams = _Streams(self._stages, self._data, self._batch_size, self._weightings)
        qtensors: dict[str, QTensor] = {}
        groups = self._groups(choice)
        for site, specs in track(groups, "propagate", len(groups)):
            if site is None:
                made = {spec.path: self._candidates.qtensor(spec, choice[spec.path]) for spec in specs}
            else:
                weights = {spec.path: self._candidates.weight(spec, choice[spec.path]) for spec in specs}
                made = {}
                for paths, (gram, cross) in streams.moments(site, [*weights], params, rounded).items():
                    corrected = _correction(gram, cross, self._strength)
                    for path in paths:
                        made[path] = self._candidates.quantizer(corrected(weights[path]), choice[path], gram)
            qtensors |= made
            rounded = apply_plan(rounded, specs, made)
        return qtensors

    def _groups(self, choice: Mapping[str, Scheme]) -> list[tuple[Site | None, list[WeightSpec]]]:
        """Weights that are rounded together, in the order of execution, with the first site that reads their value.

        No site: the weight is rounded as it is.
        """
        reading: dict[str | None, Site] = {site.use.input: site for site in self._stages.sites}
        groups: dict[str, tuple[Site | None, list[WeightSpec]]] = {}
        specs = {path: self._candidates.spec(path) for path in choice}
        for path in dict.fromkeys(site.spec.path for site in self._traced.sites if site.spec.path in specs):
            site = reading.get(_own_input(specs[path]))
            groups.setdefault(path if site is None else site.use.input, (site, []))[1].append(specs[path])
        return list(groups.values())


def _own_input(spec: WeightSpec) -> str | None:
    """The one value that the weight, a single matrix, multiplies."""
    return sole_input(spec) if spec.batch == 1 else None


def _first_sites(traced: Trace) -> list[Site]:
    """The first site of every value that is some weight's own."""
    first: dict[str, Site] = {}
    for site in traced.sites:
        if (value := _own_input(site.spec)) is not None:
            first.setdefault(value, site)
    return list(first.values())


class _Streams:
    """What flows through the original model and through the one that is being rounded, as far as it was asked for."""

    def __init__(self, stages: Stages, data: Dataset, batch_size: int, weightings: Sequence[Weighting] | None):
        batches = list(data.batches(batch_size))
        self._stages, self._reached, self._weightings = stages, 0, weightings
        self._masks = [batch.mask for batch in batches]
        self._original = [stages.start(batch.inputs) for batch in batches]
        self._real = list(self._original)

    def moments(
        self, site: Site, paths: Sequence[str], params: Params, rounded: Params
    ) -> dict[tuple[str, ...], tuple[jax.Array, jax.Array]]:
        """`float32[1, k, k]` E[x' x'^T] and E[x' x^T] of the value that a site reads; sites have to come in order.

        Args:
          site: the first that reads the value.
          paths: of the weights that do.
          params: the original ones.
          rounded: those of the model that is being rounded.

        Returns:
          By weights for which they are the same: all, or each alone where tokens are weighted.
        """
        stages, k = range(self._reached, self._stages.sites.index(site) + 1), site.spec.k
        parts = [tuple(paths)] if self._weightings is None else [(path,) for path in paths]
        sums: dict[tuple[str, ...], _Moments] = {part: tuple(jnp.zeros((1, k, k)) for _ in range(4)) for part in parts}
        masses: dict[tuple[str, ...], list[jax.Array]] = {part: [] for part in parts}
        for i, mask in enumerate(self._masks):
            original, self._original[i] = self._run(stages, params, self._original[i])
            real, self._real[i] = self._run(stages, rounded, self._real[i])
            for part in parts:
                weight = self._weight(i, (part[0], site.use.input), counted_rows(site, mask))
                sums[part] = _add(sums[part], *map(site.inputs_matrix, (real, original)), weight)
                masses[part].append(weight.sum())
        self._reached = stages.stop
        mean = lambda total, rest, mass: jnp.asarray((total + rest) / (mass or 1.0), jnp.float32)
        means = {}
        for part, entry in sums.items():
            gram, gram_rest, cross, cross_rest = (np.asarray(one).astype(np.float64) for one in entry)
            mass = sum(map(float, masses[part]))
            means[part] = mean(gram, gram_rest, mass), mean(cross, cross_rest, mass)
        return means

    def _weight(self, number: int, read: Read, counted: jax.Array) -> jax.Array:
        """`float32[tokens]`, how much each of a batch counts."""
        weight = counted.astype(jnp.float32)
        return weight if self._weightings is None else weight * self._weightings[number][read][0]

    def _run(self, stages: range, params: Params, values: Values) -> tuple[jax.Array, Values]:
        *before, last = stages
        for number in before:
            _, values = self._stages.run(number, params, values)
        return self._stages.run(last, params, values)


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: _Moments, real: jax.Array, original: jax.Array, weight: jax.Array) -> _Moments:
    """Totals after one batch of `[1, tokens, k]` values, each counted as `weight: float32[tokens]` says."""
    root = jnp.sqrt(weight)[:, None]
    real, original = (jnp.where(root > 0, x.astype(jnp.float32) * root, 0.0) for x in (real, original))
    gram, gram_rest, cross, cross_rest = sums
    return (*add_product(gram, gram_rest, real, real), *add_product(cross, cross_rest, real, original))


def _correction(gram: jax.Array, cross: jax.Array, strength: float) -> Callable[[jax.Array], jax.Array]:
    """W to W', both `float32[1, k, n]`, for all that read one value. A channel that is always 0 keeps its row."""
    a, c = (np.asarray(one[0]).astype(np.float64) for one in (gram, cross))
    damping = max(DAMPING * float(np.diagonal(a).mean()), float(np.finfo(np.float32).tiny)) * np.eye(len(a))
    factors, c = lu_factor(a + damping), c + damping

    def corrected(weight: jax.Array) -> jax.Array:
        w = np.asarray(weight)
        fit = lu_solve(factors, c @ w[0].astype(np.float64)).astype(np.float32)
        return jax.device_put(w + np.float32(strength) * (fit - w))

    return corrected
