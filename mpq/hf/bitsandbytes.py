"""Checkpoints of bitsandbytes: NF4, also with scales that are quantized again; `mpq.hf.llm_int8` has LLM.int8.

Facts from bitsandbytes 0.50 (`functional.py`, `backends/default/ops.py`): `weight` is `uint8[n * k / 2, 1]`, the
elements of `[n, k]` in C order, two a byte, the first in the high bits; `weight.absmax` one float32 for every block of
them; `weight.quant_map` the 16 levels; `weight.quant_state.bitsandbytes__nf4` JSON as bytes. Nested, `absmax` are codes
of 8 bits: `nested_quant_map[absmax] * nested_absmax` of their block, plus `nested_offset`. Blocks are groups of a
row, where they fill it.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.formats import FORMATS
from mpq.hf.container import NOTHING, Part, Parts, Read, Reader, Shape, Site, one_float, plain_layers
from mpq.hf.llm_int8 import LLMInt8
from mpq.types import MpqError, QTensor, Scheme

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_NF4 = FORMATS["nf4"]


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """NF4 with float32 scales for linear layers but the head, as `bitsandbytes.functional.quantize_4bit` stores it."""

    name: str = "bitsandbytes"
    scale_dtype: str | None = "float32"
    beside = NOTHING

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why not."""
        if site.head or site.kind != "matmul":
            return "embeddings and heads stay plain floats there"
        if scheme.format != _NF4 or scheme.scale_dtype != "float32" or scheme.group_size not in BLOCKS:
            return f"it takes nf4_gN_sfloat32 with N of {', '.join(map(str, BLOCKS))}"
        if site.k % scheme.group_size:
            return f"its blocks must fill rows, and the weight has {site.k} of them"
        return None

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        return {
            "weight": Part("uint8", (k * n // 2, 1)),
            "weight.absmax": Part("float32", (scheme.num_groups(k) * n,)),
            "weight.quant_map": Part("float32", (16,)),
            f"{_STATE}nf4": Part("uint8", (len(_state(scheme, k, n)),)),
        }

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content."""
        codes = np.asarray(qtensor.qvalue)[0].T.astype(np.uint8)
        n, k = codes.shape
        pairs = codes.reshape(-1, 2)
        return {
            "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
            "weight.absmax": np.asarray(qtensor.scale)[0].T.reshape(-1),
            "weight.quant_map": np.asarray(_NF4.decode(jnp.arange(16))),
            f"{_STATE}nf4": np.frombuffer(_state(qtensor.scheme, k, n), np.uint8),
        }

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config`; what stays plain is named, the head always.

        Raises:
          MpqError: plain floats of several types.
        """
        one_float(self.name, modules, sites)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(dict.fromkeys([*plain_layers(modules, sites), "lm_head"])),
        }

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint with this config, one of LLM.int8 too."""
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            return LLMInt8().reader(config)
        marks = (f"{_STATE}nf4", f"{_STATE}fp4")
        names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        ends = ("weight", *marks, *(f"weight.{name}" for name in names))

        def describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
            try:
                body = json.loads(read(marks[0]).tobytes())
            except KeyError as error:
                raise MpqError(f"{module} is in the 4-bit floats of bitsandbytes (fp4), which are not read") from error
            n, k = body["shape"]
            return Scheme(_NF4, body["blocksize"], scale_dtype="float32"), n, k

        return Reader(marks, ends, describe, lambda module, parts: _unpack(parts))


def _state(scheme: Scheme, k: int, n: int) -> bytes:
    body = {"quant_type": "nf4", "blocksize": scheme.group_size, "dtype": "float32", "shape": [n, k]}
    return json.dumps(body).encode()


def _unpack(parts: Parts) -> QTensor:
    state = json.loads(parts[f"{_STATE}nf4"].tobytes())
    (n, k), size = state["shape"], state["blocksize"]
    if k % size:
        raise MpqError(f"blocks of {size} of bitsandbytes go over rows of {k}, which is not read")
    levels = np.asarray(_NF4.decode(jnp.arange(16)))
    if not np.array_equal(parts["weight.quant_map"], levels):
        raise MpqError("the levels of nf4 are not those of bitsandbytes: the checkpoint is damaged")
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = np.repeat(parts["weight.nested_absmax"], state["nested_blocksize"])[: absmax.size]
        absmax = parts["weight.nested_quant_map"][absmax] * outer + np.float32(state["nested_offset"])
    packed = parts["weight"].reshape(-1).view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(n, k).T.astype(np.int8)
    scheme = Scheme(_NF4, size, scale_dtype="float32")
    scale = absmax.astype(np.float32).reshape(n, k // size).T
    return QTensor(jnp.asarray(codes[None]), jnp.asarray(scale[None]), None, scheme)
