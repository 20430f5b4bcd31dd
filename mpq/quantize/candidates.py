"""Quantized weights on demand: every (weight, scheme) pair is computed once, when it is first asked for."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.files import digest_arrays, digest_json
from mpq.finite import all_finite
from mpq.formats.ggml import require_fit
from mpq.progress import track
from mpq.quantize.quantizer import Quantizer
from mpq.quantize.shelf import Shelf
from mpq.quantize.widths import common
from mpq.types import LayerStats, MpqError, Params, QTensor, Scheme, WeightSpec

KEEP_BYTES = 2**26
"""So much of quantized weights stays in memory, or a quarter of the weights themselves where that is more."""

_dequantize = jax.jit(QTensor.dequantize)


def dequantize(qtensor: QTensor) -> jax.Array:
    """`float32[batch, k, n]`, compiled; `QTensor.dequantize` does not depend on the width of an integer."""
    return _dequantize(dataclasses.replace(qtensor, scheme=common(qtensor.scheme)[0]))


class Candidates:
    """The weights of one model under any scheme, by one rounding algorithm.

    Weights are computed one at a time, so a result depends on nothing but its own weight, gram and scheme: the same
    bits whatever else was asked for before. Weights of equal shape share their compilations. Results are kept, those of
    a large model in a temporary file: ten schemes would take the memory of some two and a half models.
    """

    def __init__(
        self,
        params: Params,
        weights: Sequence[WeightSpec],
        quantizer: Quantizer,
        stats: Mapping[str, LayerStats] | None = None,
    ) -> None:
        """Compute nothing yet.

        Args:
          params: the model's parameters.
          weights: what `trace` found.
          quantizer: rounding algorithm.
          stats: calibration statistics by weight path; a weight without any is rounded without a gram.
        """
        self.quantizer, self.params = quantizer, params
        self._weights = {spec.path: spec for spec in weights}
        self._stats = stats or {}
        self._checked: set[str] = set()
        self._digests: dict[str, str] = {}
        self._qtensors = Shelf(max(KEEP_BYTES, sum(spec.size for spec in weights)))

    def qtensor(self, spec: WeightSpec, scheme: Scheme) -> QTensor:
        """The quantized weight.

        Raises:
          MpqError: the weight is not one of this model's, it or its gram holds NaN or infinity, or its rows do not fill
            the blocks of the scheme.
        """
        key = (spec.path, scheme)
        require_fit(scheme, spec.k, f"weight {spec.path}")
        if key not in self._qtensors:
            weight, gram = self._inputs(spec)
            self._qtensors[key] = self.quantizer(weight, scheme, gram)
        return self._qtensors[key]

    def dequantized(self, spec: WeightSpec, scheme: Scheme) -> jax.Array:
        """What the quantized weight stands for, `float32[batch, k, n]`. Raises as `qtensor` does.

        Where a scheme does not fit the weight there is no candidate, and this is the weight itself: its entry in a
        table is 0 and has no meaning, and no allocation may choose it.
        """
        if not scheme.fits(spec.k):
            return self._inputs(spec)[0]
        return dequantize(self.qtensor(spec, scheme))

    def digest(self, spec: WeightSpec, scheme: Scheme) -> str:
        """sha256 of all that the quantized weight is made of, without making it.

        That is the weight, its gram where the rounding algorithm uses one, that algorithm with its options, and the
        scheme. Raises as `qtensor` does.
        """
        if spec.path not in self._digests:
            weight, gram = self._inputs(spec)
            used = {} if gram is None or not self.quantizer.data_aware else {"gram": gram}
            self._digests[spec.path] = digest_arrays({"weight": weight, **used})
        return digest_json([repr(self.quantizer), str(scheme), self._digests[spec.path]])

    def choose(self, choice: Mapping[str, Scheme]) -> dict[str, QTensor]:
        """The quantized weights of a plan: path -> scheme in, path -> `QTensor` out.

        Raises:
          MpqError: a path is not one of this model's weights; or as `qtensor` does.
        """
        specs = {path: self.spec(path) for path in choice}
        missing = [key for key in choice.items() if key not in self._qtensors]
        for path, scheme in track(missing, "quantize", len(missing)) if missing else ():
            self.qtensor(specs[path], scheme)
        return {path: self.qtensor(specs[path], scheme) for path, scheme in choice.items()}

    def spec(self, path: str) -> WeightSpec:
        """The weight that a plan names.

        Raises:
          MpqError: it is not one of this model's.
        """
        if path not in self._weights:
            raise MpqError(
                f"the plan names {path}, which is not one of the {len(self._weights)} weights: trace it again"
            )
        return self._weights[path]

    def weight(self, spec: WeightSpec, scheme: Scheme) -> jax.Array:
        """The weight itself, `float32[batch, k, n]`, if the scheme fits it. Raises as `qtensor` does."""
        require_fit(scheme, spec.k, f"weight {spec.path}")
        return self._inputs(spec)[0]

    def squared_error(self, spec: WeightSpec, scheme: Scheme) -> float:
        """Sum of squared differences to the weight. Raises as `qtensor` does."""
        got = np.asarray(self.dequantized(spec, scheme), np.float64)
        return float(np.sum((got - np.asarray(spec.read(self.params), np.float64)) ** 2))

    def ignores_statistics(self, spec: WeightSpec, scheme: Scheme) -> bool:
        """Whether the weight is rounded as it would be without statistics. Raises as `qtensor` does."""
        weight, _ = self._inputs(spec)
        plain, got = self.quantizer(weight, scheme), self.qtensor(spec, scheme)
        same = jax.tree.map(np.array_equal, plain, got)
        return all(jax.tree.leaves(same))

    def _inputs(self, spec: WeightSpec) -> tuple[jax.Array, jax.Array | None]:
        """Weight and gram, checked once."""
        if self._weights.get(spec.path) != spec:
            raise MpqError(f"weight {spec.path} is not one of the {len(self._weights)} of this model: trace it again")
        weight, stats = spec.read(self.params), self._stats.get(spec.path)
        gram = None if stats is None else jnp.asarray(stats.gram, jnp.float32)
        if spec.path not in self._checked:
            if not all_finite(weight):
                raise MpqError(f"weight {spec.path} holds NaN or infinity: mend the checkpoint before quantizing it")
            if gram is not None and not all_finite(gram):
                raise MpqError(f"the gram of weight {spec.path} holds NaN or infinity: calibrate again, on other text")
            if gram is not None and gram.shape != (spec.batch, spec.k, spec.k):
                want = [spec.batch, spec.k, spec.k]
                raise MpqError(
                    f"the gram of weight {spec.path} is {list(gram.shape)}, not {want}: calibrate this model"
                )
            self._checked.add(spec.path)
        return weight, gram


def apply_plan(params: Params, weights: Sequence[WeightSpec], qtensors: Mapping[str, QTensor]) -> dict[str, jax.Array]:
    """The parameters with quantized weights in the place of the original ones (fake quantization).

    Args:
      params: the model's parameters.
      weights: what `trace` found.
      qtensors: quantized weights by path; weights without one stay as they are.

    Raises:
      MpqError: a quantized weight is of no weight in `weights`.
    """
    known = {spec.path: spec for spec in weights}
    if unknown := [path for path in qtensors if path not in known]:
        raise MpqError(f"quantized weight {unknown[0]} is not one of the {len(known)} of this model: trace it again")
    result = dict(params)
    for path, qtensor in qtensors.items():
        result = known[path].write(result, dequantize(qtensor))
    return result
