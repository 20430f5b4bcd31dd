"""Checkpoints of compressed-tensors: what vLLM and `transformers` read; widths and groups may be mixed.

Facts from compressed-tensors 0.20 (`compressors/pack_quantized`, `naive_quantized`, `quantization/quant_args.py`). In
"pack-quantized" `weight_packed` of every module is `int32[n, words of k]`, rows of words (`mpq.hf.words`);
`weight_scale` is `[n, groups]`, of a whole matrix `[1]`; `weight_zero_point` is `int32[words of n, groups]`, words
along the first axis, and missing where 0 is stored for all; `weight_shape` is `int64[2]`. In "int-quantized" `weight`
is `int8[n, k]`, and inputs are rounded to 8 bits (W8A8): by token as they come, or all by one `input_scale`, `[1]`, and
where they are not symmetric an `input_zero_point`, `int8[1]`. Codes of inputs go from -128 to 127, where ours of a
symmetric range begin at -127. `config_groups` says which modules have which format, width, groups and inputs; the
format of a checkpoint with packed and plain codes is "mixed-precision".

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

from mpq.activations.scheme import SCALE_DTYPE
from mpq.export.rules import config_groups, weights_config
from mpq.formats.integer import Integer
from mpq.hf.container import Inputs, Part, Parts, Read, Reader, Shape, Site, signed, unsigned
from mpq.hf.words import pack_rows, unpack_rows, words_of
from mpq.types import MpqError, QTensor, Scheme

_SCALES = ("float16", "bfloat16", "float32")
_PACKED, _INTEGERS, _BOTH = "pack-quantized", "int-quantized", "mixed-precision"
_INPUTS: Mapping[str, Mapping[str, Any]] = {
    scheme: {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}
    for scheme, symmetric, strategy, dynamic in (
        ("int8_token", True, "token", True),
        ("int8_tensor_static", True, "tensor", False),
        ("int8_tensor_static_asym", False, "tensor", False),
    )
}
"""How inputs are rounded -> `input_activations`."""
_MIDDLE = 128  # zero points are of signed codes there


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Integers of 2 to 8 bits, one scale for a group, an output channel or the matrix.

    Attributes:
      rounds: inputs of symmetric int8 by channel or matrix are rounded too, and such weights are int-quantized.
      ranges: path of such a weight -> scale and zero point (`0 .. 255`, None of a symmetric one) of its inputs; others
        are rounded by token as they come.
    """

    rounds: bool = False
    ranges: Mapping[str, tuple[float, int | None]] = dataclasses.field(default_factory=dict)
    name: str = "compressed-tensors"
    scale_dtype: str | None = None

    @property
    def beside(self) -> Mapping[str, Parts]:
        """Scales and zero points of inputs; scales are numbers of float16."""
        made: dict[str, Parts] = {}
        for path, (scale, zero) in self.ranges.items():
            zeros = {} if zero is None else {"input_zero_point": np.array([zero - _MIDDLE], np.int8)}
            made[path] = {"input_scale": np.array([scale], SCALE_DTYPE), **zeros}
        return made

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
        of = lambda m, s: (*weights_config(s), ("inputs", self._inputs(sites[m].path, s)))
        body = config_groups({m: of(m, s) if s.has_scale else None for m, s in modules.items()})
        groups: dict[str, Any] = {}
        for name, group in body["config_groups"].items():
            how = group["weights"].pop("inputs")
            inputs, form = (None, _PACKED) if how is None else (dict(_INPUTS[how]), _INTEGERS)
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

    def _inputs(self, path: str, scheme: Scheme) -> str | None:
        """A key of `_INPUTS`, or None."""
        if not (self.rounds and has_rounded_inputs(scheme)):
            return None
        if path not in self.ranges:
            return "int8_token"
        return "int8_tensor_static" if self.ranges[path][1] is None else "int8_tensor_static_asym"

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint with this config.

        Raises:
          MpqError: another format, inputs that are rounded otherwise, or a group that is no group of integers.
        """
        form = config.get("format") or _PACKED
        if form not in (_PACKED, _INTEGERS, _BOTH):
            raise MpqError(
                f"compressed-tensors format {form!r} is not read: supported is {', '.join((_PACKED, _INTEGERS, _BOTH))}"
            )
        groups = [_Group.of(name, body, form) for name, body in dict(config.get("config_groups") or {}).items()]
        marks = ("weight_packed", *(("weight_scale",) if any(not group.packed for group in groups) else ()))
        ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        ends = (*ends, "input_scale", "input_zero_point")

        def describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
            group = _group_of(module, groups)
            n, k = map(int, read("weight_shape")) if group.packed else shape("weight")[0]
            return group.scheme(shape("weight_scale")[1]), n, k

        unpack = lambda module, parts: _unpack(_group_of(module, groups), parts)
        return Reader(marks, ends, describe, unpack, lambda module, read: _group_of(module, groups).rounded(read))


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
    inputs: str | None

    @classmethod
    def of(cls, name: str, body: Mapping[str, Any], form: str) -> "_Group":
        weights, inputs = body.get("weights") or {}, body.get("input_activations")
        packed = (body.get("format") or form) != _INTEGERS
        known = weights.get("type", "int") == "int" and weights.get("strategy") in ("group", "channel", "tensor")
        order = weights.get("actorder") in (None, False, "static", "weight")  # "group" stores the order of the rows
        how = _scheme_of(inputs or {})
        if not packed:  # W8A8, and its codes as they are
            known &= bool(weights.get("num_bits") == 8 and weights.get("symmetric") and how)
        if not known or not order or (packed and inputs) or body.get("output_activations"):
            raise MpqError(
                f"config group {name!r} of compressed-tensors is not read: supported are weights alone, as integers "
                "with scales of groups, channels or tensors in the order of the columns, and int8 beside inputs that "
                f"are rounded by {', '.join(_INPUTS)}"
            )
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        flags = bool(weights.get("symmetric", True)), weights["strategy"] == "tensor"
        return cls(tuple(body.get("targets") or ()), int(weights.get("num_bits", 8)), size, *flags, packed, how)

    def scheme(self, scale_dtype: str) -> Scheme:
        """Of its modules."""
        return Scheme(Integer(self.bits), self.group_size, not self.symmetric, scale_dtype, self.per_tensor)

    def rounded(self, read: Read) -> Inputs:
        """How inputs of a module are rounded; the range is the one of its scale and zero point.

        Raises:
          MpqError: a scale is no positive number of float16, as those of activations are here.
        """
        if self.inputs is None or "static" not in self.inputs:
            return None if self.inputs is None else (self.inputs, None)
        asymmetric, scale = self.inputs.endswith("_asym"), np.float32(read("input_scale").reshape(()))
        if not (0 < scale < np.inf and np.float32(np.asarray(scale, SCALE_DTYPE)) == scale):
            raise MpqError(f"the scale of inputs {scale:g} is no positive number of {SCALE_DTYPE}, as ours are")
        zero = int(read("input_zero_point").reshape(())) + _MIDDLE if asymmetric else 127
        return self.inputs, np.array([[-zero * scale], [((255 if asymmetric else 254) - zero) * scale]], np.float32)


def _scheme_of(inputs: Mapping[str, Any]) -> str | None:
    """The key of `_INPUTS` whose entries these arguments have, whatever they say beside."""
    given = {"type": "int", "symmetric": True, "dynamic": False, **inputs}
    return next((name for name, of in _INPUTS.items() if all(given.get(k) == v for k, v in of.items())), None)


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
