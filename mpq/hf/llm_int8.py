"""Checkpoints of LLM.int8, as `Linear8bitLt` of bitsandbytes stores its layers and `transformers` loads them.

Facts from bitsandbytes 0.50 (`nn/modules.py`, `backends/default/ops.py`) and `transformers` 5.23
(`integrations/bitsandbytes.py`): `weight` is `int8[n, k]`, `SCB` `float32[n]` the absolute maximum of each row, that is
127 of our scales, and `weight_format` a `uint8` without axes, 0 for rows as they are. Inputs are always rounded, by
token in 8 bits, but for features that reach `llm_int8_threshold` (0: all features are rounded); the threshold is one
for all layers, and 6 where a plan says nothing of activations. Weights of other layers are plain floats, whose inputs
stay as they are.

127 of a scale of float16 have at most 18 significant bits, so such scales are stored exactly and found again: where the
maxima of a layer are all 127 of a float16, that is what its scales are read as. The same is not true of float32, where
one scale in 128 is no maximum over 127: those, which bitsandbytes makes itself, are only read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.formats import FORMATS
from mpq.hf.container import NOTHING, Part, Parts, Read, Reader, Shape, Site, one_float, plain_layers
from mpq.types import MpqError, QTensor, Scheme, WeightSpec

_SCHEME = Scheme(FORMATS["int8"])


@dataclasses.dataclass(frozen=True)
class LLMInt8:
    """int8 by output channel for linear layers but the head.

    Attributes:
      threshold: features that reach it stay in floating point; 0: none does.
    """

    threshold: float = 6.0
    name: str = "llm_int8"
    scale_dtype: str | None = "float32"
    beside = NOTHING

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why not."""
        if site.head or site.kind != "matmul":
            return "embeddings and heads stay plain floats there"
        return None if scheme == _SCHEME else f"it takes {_SCHEME}, with scales of float16"

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        return {"weight": Part("int8", (n, k)), "SCB": Part("float32", (n,)), "weight_format": Part("uint8", ())}

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content."""
        codes = np.ascontiguousarray(np.asarray(qtensor.qvalue)[0].T)
        absmax = np.asarray(qtensor.scale, np.float32).reshape(-1) * np.float32(127)
        return {"weight": codes, "SCB": absmax, "weight_format": np.array(0, np.uint8)}

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config`; what stays plain is named, the head always.

        Raises:
          MpqError: plain floats of several types.
        """
        one_float("bitsandbytes", modules, sites)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": self.threshold,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(dict.fromkeys([*plain_layers(modules, sites), "lm_head"])),
        }

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint of LLM.int8."""
        threshold = float(config.get("llm_int8_threshold", LLMInt8.threshold))
        scheme = "int8_token" + (f"_outlier{threshold:g}" if threshold else "")
        ends, unpack = ("weight", "SCB", "weight_format"), lambda module, parts: _unpack(parts)
        return Reader(("SCB",), ends, _describe, unpack, lambda module, read: (scheme, None))


def stored_bits(spec: WeightSpec, scheme: Scheme) -> int:
    """Bits of the weight in the file, whose scales are always float32."""
    return spec.size_bits(dataclasses.replace(scheme, scale_dtype="float32") if scheme.has_scale else scheme)


def _scale(absmax: np.ndarray) -> np.ndarray:
    """`[n]`: what the codes of each row are multiplied by, float16 where that says it all."""
    scale = absmax.astype(np.float32) / np.float32(127)
    half = np.clip(scale, -65504, 65504).astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale) else scale


def _describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
    n, k = shape("weight")[0]
    return dataclasses.replace(_SCHEME, scale_dtype=_scale(read("SCB")).dtype.name), n, k


def _unpack(parts: Parts) -> QTensor:
    if parts["weight"].dtype != np.int8 or parts.get("weight_format", np.uint8(0)) != 0:
        raise MpqError("codes of LLM.int8 that are not int8 in rows (weight_format) are not read: save them anew")
    scale = _scale(parts["SCB"])
    scheme = dataclasses.replace(_SCHEME, scale_dtype=scale.dtype.name)
    return QTensor(jnp.asarray(parts["weight"].T[None]), jnp.asarray(scale[None, None]), None, scheme)
