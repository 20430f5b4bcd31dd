"""Checkpoints of compressed-tensors: what vLLM and `transformers` read; widths and groups may be mixed.

Facts from compressed-tensors 0.20 (`compressors/pack_quantized`, `naive_quantized`, `quantization/quant_args.py`). In
"pack-quantized" `weight_packed` of every module is `int32[n, words of k]`, rows of words (`mpq.hf.words`);
`weight_scale` is `[n, groups]`, of a whole matrix `[1]`; `weight_zero_point` is `int32[words of n, groups]`, words
along the first axis, and missing where 0 is stored for all; `weight_shape` is `int64[2]`. In "int-quantized" `weight`
is `int8[n, k]`, and inputs are rounded as they come, 8 bits by token (W8A8). `config_groups` says which modules have
which format, width and groups; the format of a checkpoint with both is "mixed-precision".

`transformers` 5.23 loads it with version 0.18 or later: any mix of widths without zero points. With zero points it
fails on packed ones unless it dequantizes as it loads (`dequantize`), for which it takes the first group's scheme for
all: so that is written for plans of one scheme, and mixed plans with zero points are for vLLM and for `mpq` itself.
vLLM has kernels for 4 and 8 bits; on CPUs for packed 4 bits and for W8A8 (`experiments/vllm_cpu.py`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.export.rules import config_groups, weights_config
from mpq.formats.integer import Integer
from mpq.hf.container import Part, Parts, Read, Reader, Shape, Site, signed, unsigned
from mpq.hf.words import pack_rows, unpack_rows, words_of
from mpq.types import MpqError, QTensor, Scheme

_SCALES = ("float16", "bfloat16", "float32")
_PACKED, _INTEGERS, _BOTH = "pack-quantized", "int-quantized", "mixed-precision"
_BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""How inputs are rounded."""


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Integers of 2 to 8 bits, one scale for a group, an output channel or the matrix.

    Attributes:
      rounds: inputs of symmetric int8 by channel or matrix are rounded too, and such weights are int-quantized.
    """

    rounds: bool = False
    name: str = "compressed-tensors"
    scale_dtype: str | None = None

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why not."""
        if site.kind != "matmul":
            return "transformers loads no quantized embedding, nor one that is head too"
        if not isinstance(scheme.format, Integer) or scheme.blocks is not None or scheme.scale_dtype not in _SCALES:
            return f"it takes int2 to int8 with scales of {', '.join(_SCALES)}"
        if scheme.group_size and site.k % scheme.group_size:
            return f"it takes whole groups only, and the weight has {site.k} rows"
        if scheme.per_tensor and scheme.zero_point:
            return "it has no zero point of a whole matrix"
        return None

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        bits, groups = scheme.format.bits, scheme.num_groups(k)
        scale = (1,) if scheme.per_tensor else (n, groups)
        if self.rounds and has_rounded_inputs(scheme):
            return {"weight": Part("int8", (n, k)), "weight_scale": Part(scheme.scale_dtype, scale)}
        parts = {
            "weight_packed": Part("int32", (n, words_of(k, bits))),
            "weight_scale": Part(scheme.scale_dtype, scale),
            "weight_shape": Part("int64", (2,)),
        }
        return parts | ({"weight_zero_point": Part("int32", (words_of(n, bits), groups))} if scheme.zero_point else {})

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content."""
        scheme, bits = qtensor.scheme, qtensor.scheme.format.bits
        scale = np.asarray(qtensor.scale)[0].T
        scale = np.ascontiguousarray(scale.reshape(-1) if scheme.per_tensor else scale)
        if self.rounds and has_rounded_inputs(scheme):
            return {"weight": np.ascontiguousarray(np.asarray(qtensor.qvalue)[0].T), "weight_scale": scale}
        codes = unsigned(qtensor.qvalue, bits)
        parts = {
            "weight_packed": pack_rows(codes.T, bits),
            "weight_scale": scale,
            "weight_shape": np.array(codes.shape[::-1], np.int64),
        }
        if qtensor.zero_point is not None:
            parts["weight_zero_point"] = np.ascontiguousarray(pack_rows(unsigned(qtensor.zero_point, bits), bits).T)
        return parts

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config`, every module named by a pattern."""
        schemes = {scheme for scheme in modules.values() if scheme.has_scale}
        whole = len(schemes) == 1 and any(scheme.zero_point for scheme in schemes)
        named = {m: weights_config(s) if s.has_scale else None for m, s in modules.items()}
        body = config_groups(named)
        rounded = {weights_config(scheme) for scheme in schemes if self.rounds and has_rounded_inputs(scheme)}
        groups: dict[str, Any] = {}
        for name, group in body["config_groups"].items():
            integers = tuple(group["weights"].items()) in rounded
            inputs, form = (_BY_TOKEN, _INTEGERS) if integers else (None, _PACKED)
            groups[name] = group | {"input_activations": inputs, "output_activations": None, "format": form}
        forms = {group["format"] for group in groups.values()} or {_PACKED}
        return {
            "quant_method": "compressed-tensors",
            "format": _BOTH if len(forms) > 1 else forms.pop(),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": body["ignore"],
            **({"dequantize": True} if whole else {}),
        }

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint with this config.

        Raises:
          MpqError: another format, inputs that are quantized too, or a group that is no group of integers.
        """
        form = config.get("format") or _PACKED
        if form not in (_PACKED, _INTEGERS, _BOTH):
            raise MpqError(
                f"compressed-tensors format {form!r} is not read: supported is {', '.join((_PACKED, _INTEGERS, _BOTH))}"
            )
        groups = [_Group.of(name, body, form) for name, body in dict(config.get("config_groups") or {}).items()]
        marks = ("weight_packed", *(("weight_scale",) if any(not group.packed for group in groups) else ()))
        ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

        def describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
            group = _group_of(module, groups)
            n, k = map(int, read("weight_shape")) if group.packed else shape("weight")[0]
            return group.scheme(shape("weight_scale")[1]), n, k

        return Reader(marks, ends, describe, lambda module, parts: _unpack(_group_of(module, groups), parts))


def has_rounded_inputs(scheme: Scheme) -> bool:
    """Whether vLLM has products of integers for weights of this scheme, W8A8."""
    return scheme.format == Integer(8) and scheme.group_size is None and not scheme.zero_point


@dataclasses.dataclass(frozen=True)
class _Group:
    """One entry of `config_groups`."""

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    symmetric: bool
    per_tensor: bool
    packed: bool

    @classmethod
    def of(cls, name: str, body: Mapping[str, Any], form: str) -> "_Group":
        weights, inputs = body.get("weights") or {}, body.get("input_activations")
        packed = (body.get("format") or form) != _INTEGERS
        known = weights.get("type", "int") == "int" and weights.get("strategy") in ("group", "channel", "tensor")
        order = weights.get("actorder") in (None, False, "static", "weight")  # "group" stores the order of the rows
        if not packed:  # W8A8 that needs nothing of calibration, and its codes as they are
            known &= bool(weights.get("num_bits") == 8 and weights.get("symmetric") and (inputs or {}).get("dynamic"))
        if not known or not order or (packed and inputs) or body.get("output_activations"):
            raise MpqError(
                f"config group {name!r} of compressed-tensors is not read: supported are weights alone, as integers "
                "with scales of groups, channels or tensors in the order of the columns, and int8 beside inputs that "
                "are rounded as they come"
            )
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        flags = bool(weights.get("symmetric", True)), weights["strategy"] == "tensor"
        return cls(tuple(body.get("targets") or ()), int(weights.get("num_bits", 8)), size, *flags, packed)

    def scheme(self, scale_dtype: str) -> Scheme:
        """Of its modules."""
        return Scheme(Integer(self.bits), self.group_size, not self.symmetric, scale_dtype, self.per_tensor)


def _group_of(module: str, groups: list[_Group]) -> _Group:
    """As `match_targets`: names and patterns before classes, in the order of the config."""
    for group in groups:
        if any(t == module or (t.startswith("re:") and re.match(t[3:], module)) for t in group.targets):
            return group
    for group in groups:
        if {"Linear", "Embedding"} & set(group.targets):
            return group
    raise MpqError(f"module {module!r} is quantized, and no config group of compressed-tensors names it")


def _unpack(group: _Group, parts: Parts) -> QTensor:
    n, k = map(int, parts["weight_shape"]) if group.packed else parts["weight"].shape
    bits, scale = group.bits, parts["weight_scale"]
    scheme = group.scheme(scale.dtype.name)
    name, shape = ("weight_packed", (n, words_of(k, bits))) if group.packed else ("weight", (n, k))
    stored = parts[name]
    if stored.shape != shape or scale.size != (1 if group.per_tensor else n * scheme.num_groups(k)):
        raise MpqError(f"{name} {list(stored.shape)} and its scales do not hold [{n}, {k}] codes of {bits} bits")
    zero = None
    if not group.symmetric:
        zero = jnp.asarray(signed(unpack_rows(parts["weight_zero_point"].T, n, bits), bits))
    codes = signed(unpack_rows(stored, k, bits).T, bits) if group.packed else stored.T[None]
    return QTensor(jnp.asarray(codes), jnp.asarray(scale.reshape(scheme.scale_shape(k, n)[::-1]).T[None]), zero, scheme)
