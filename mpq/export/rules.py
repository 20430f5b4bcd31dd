"""A plan as rules for other quantizers: `mpq` chooses, the other tool rounds and stores.

Facts about the formats, read from the sources named:

- llama.cpp (tools/quantize/quantize.cpp at 0bae9d8, src/llama-quant.cpp): `--tensor-type REGEX=TYPE`, or many of them
  in a `--tensor-type-file`, separated by white space. Patterns are put in lower case and searched for, not matched as a
  whole, hence `^` and `$`. They count only without `--pure` and where the type at the end of the command line is a
  quantized one. Where rows do not fill blocks of 32 it takes another type without a word; here that is an error.
- qwix (qwix/_src/qconfig.py at 04d2536): `QuantizationRule(module_path, weight_qtype, tile_size,
  weight_calibration_method)`. `module_path` matches the whole path, names joined by `/`; the first rule that matches
  counts, and one without `weight_qtype` leaves weights as they are. Asymmetric (`minmax`) are int4 and int8 alone.
  A `weight_qtype` is int2 to int8, nf4 or the name of a dtype (qwix/_src/core/numerics.py at 06ab217). Tables that are
  only looked up stay as they are, whatever their rule says: `PtqProvider` replaces products alone (version 0.1.8).
- compressed-tensors (quantization/quant_args.py at 016da27, utils/match.py): `config_groups` of `targets` and
  `weights`, and `ignore`. `re:` targets are matched from the start of a module's name, hence `$`.

Equal neighbours are folded: names that differ in one part become one pattern with alternatives, as long as that says
neither more nor less. So every weight is matched by exactly one rule, and the order of the rules does not matter.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mpq.files import write_json, write_text
from mpq.formats.ggml import FLOAT_TYPES, GGML_SCHEMES, require_fit
from mpq.gguf.names import gguf_name
from mpq.types import MpqError, Scheme, WeightSpec

Choices = Mapping[str, Scheme]
Weights = Sequence[WeightSpec]

GGML_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "int4_g32": "q4_0",
        "int4_g32_zp": "q4_1",
        "int5_g32": "q5_0",
        "int5_g32_zp": "q5_1",
        "int8_g32": "q8_0",
        **FLOAT_TYPES,
        **{name: name for name in GGML_SCHEMES},
    }
)
"""Scheme -> the ggml type with these bits, blocks and float16 scales. Types with an offset (q4_1, q5_1) store it as
float16 where a zero point takes 4 or 5 bits, so they are a little larger than planned."""

QWIX_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **{f"int{bits}": f"int{bits}" for bits in range(2, 9)},
        "nf4": "nf4",
        "fp4": "float4_e2m1fn",
        "fp8_e4m3": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
    }
)
"""Number format -> `weight_qtype` of qwix."""


def llama_cpp(choices: Choices, weights: Weights) -> str:
    """Lines for `--tensor-type-file`, each `REGEX=TYPE`; `--tensor-type` before each makes an option of it.

    Raises:
      MpqError: a scheme that ggml has no type for, a weight whose GGUF name is not known, or rows that do not fill
        blocks.
    """
    named: dict[str, str] = {}
    for spec in weights:
        kind = _known(str(choices[spec.path]), spec, choices, GGML_TYPES, "llama.cpp")
        require_fit(choices[spec.path], spec.k, spec.path)
        if spec.k % 32:
            raise MpqError(f"{spec.path} has rows of {spec.k}, and blocks of llama.cpp hold 32: pin it to bf16")
        _set(named, gguf_name(spec.path), kind, spec)
    return "".join(f"^{pattern}$={kind}\n" for pattern, kind in fold(named, "."))


def qwix(choices: Choices, weights: Weights) -> list[dict[str, Any]]:
    """Keyword arguments of one `qwix.QuantizationRule` each, as plain data.

    Raises:
      MpqError: a format that qwix has not, scales of 8 bits or of a whole matrix, an affine scheme that is neither int4
        nor int8, groups that do not fill `k`, a slice of a parameter, or one module that would need two rules.
    """
    named: dict[str, tuple[tuple[str, Any], ...]] = {}
    for spec in weights:
        scheme = choices[spec.path]
        _check_groups(spec, scheme)
        _check_scales(spec, scheme, "qwix")
        if scheme.per_tensor:
            raise MpqError(f"{spec.path} at {scheme}: qwix has no single scale of a weight; allow another scheme")
        if scheme.zero_point and scheme.format.bits not in (4, 8):
            raise MpqError(
                f"{spec.path} at {scheme}: qwix has a zero point with int4 and int8 only; allow another scheme"
            )
        kind = _known(scheme.format.name, spec, choices, QWIX_TYPES, "qwix") if scheme.has_scale else None
        rule: dict[str, Any] = {"weight_qtype": kind}
        rule |= {"tile_size": scheme.group_size} if scheme.group_size else {}
        rule |= {"weight_calibration_method": "minmax"} if scheme.zero_point else {}
        _set(named, _module(spec).replace(".", "/"), tuple(rule.items()), spec)
    return [{"module_path": pattern, **dict(rule)} for pattern, rule in fold(named, "/")]


def compressed_tensors(choices: Choices, weights: Weights) -> dict[str, Any]:
    """`config_groups` and `ignore` of a `quantization_config`; what is stored as plain floats is ignored.

    Module names are those of `transformers`: `model.` before all but the head.

    Raises:
      MpqError: a scheme that is neither integer nor plain float, scales of 8 bits, groups that do not fill `k`, a slice
        or stack of weights, which have no module of their own, or one module that would need two rules.
    """
    named: dict[str, tuple[tuple[str, Any], ...] | None] = {}
    for spec in weights:
        scheme = choices[spec.path]
        _check_groups(spec, scheme)
        if spec.batch > 1 or (scheme.has_scale and not scheme.format.uniform):
            raise MpqError(
                f"{spec.path} at {scheme} has no form in compressed-tensors: it takes single matrices, as integers or "
                "plain floats"
            )
        _check_scales(spec, scheme, "compressed-tensors")
        module = _module(spec)
        name = module if module == "lm_head" else f"model.{module}"
        _set(named, name, weights_config(scheme) if scheme.has_scale else None, spec)
    return config_groups(named)


def weights_config(scheme: Scheme) -> tuple[tuple[str, Any], ...]:
    """`weights` of one of compressed-tensors' `config_groups`, as pairs; of an integer scheme."""
    grouped: dict[str, Any] = {"strategy": "tensor" if scheme.per_tensor else "channel"}
    if scheme.group_size:
        grouped = {"strategy": "group", "group_size": scheme.group_size}
    value = {"num_bits": scheme.format.bits, "type": "int", "symmetric": not scheme.zero_point, **grouped}
    return tuple(value.items())


def config_groups(named: Mapping[str, tuple[tuple[str, Any], ...] | None]) -> dict[str, Any]:
    """`config_groups` and `ignore` of modules by name, each with its `weights_config`, or None to ignore it."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    ignore: list[str] = []
    for pattern, value in fold(named, "."):
        (ignore if value is None else groups.setdefault(value, [])).append(f"re:{pattern}$")
    return {
        "config_groups": {
            f"group_{index}": {"targets": targets, "weights": dict(value)}
            for index, (value, targets) in enumerate(groups.items())
        },
        "ignore": ignore,
    }


RULES: Mapping[str, Callable[[Choices, Weights], Any]] = MappingProxyType(
    {"llama.cpp": llama_cpp, "qwix": qwix, "compressed-tensors": compressed_tensors}
)
"""Tool -> its rules for a plan."""


def save(path: Path, rules: Any) -> None:
    """Write what a function of `RULES` gave: lines as text, all else as JSON."""
    if isinstance(rules, str):
        write_text(path, rules)
    else:
        write_json(path, rules)


def fold(named: Mapping[str, Any], separator: str) -> list[tuple[str, Any]]:
    """Regular expressions, each with the value of all names that it matches as a whole; no two match one name.

    Args:
      named: name -> hashable value.
      separator: between the parts of a name; names merge where all but one part are equal, the first parts first.
    """
    parts = [(tuple((part,) for part in name.split(separator)), value) for name, value in named.items()]
    for position in range(max((len(name) for name, _ in parts), default=0)):
        merged: dict[Any, tuple[str, ...]] = {}
        for name, value in parts:
            key = name[:position], name[position + 1 :], value, len(name)
            merged[key] = merged.get(key, ()) + (name[position] if position < len(name) else ())
        parts = [((*head, here, *tail) if here else head, value) for (head, tail, value, _), here in merged.items()]
    join = re.escape(separator).join
    return [(join(map(_alternatives, name)), value) for name, value in parts]


def _alternatives(parts: Iterable[str]) -> str:
    escaped = [re.escape(part) for part in parts]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _known(key: str, spec: WeightSpec, choices: Choices, types: Mapping[str, str], tool: str) -> str:
    if key not in types:
        raise MpqError(
            f"{spec.path} at {choices[spec.path]} has no type in {tool}, which takes {', '.join(types)}: allocate "
            "among these"
        )
    return types[key]


def _module(spec: WeightSpec) -> str:
    module, _, _ = spec.path.rpartition(".")
    if spec.index or not module:
        raise MpqError(f"{spec.path} has no module of its own, which rules are written for: use the Orbax export")
    return module


def _set(named: dict[str, Any], name: str, value: Any, spec: WeightSpec) -> None:
    if named.setdefault(name, value) != value:
        raise MpqError(
            f"{spec.path} shares module {name!r} with a weight at another scheme, and a rule is for all of a module: "
            "pin them to one"
        )


def _check_scales(spec: WeightSpec, scheme: Scheme, tool: str) -> None:
    if scheme.has_scale and np.dtype(scheme.scale_dtype).itemsize == 1:
        raise MpqError(f"{spec.path} at {scheme}: rules for {tool} say nothing of scales of 8 bits; allow others")


def _check_groups(spec: WeightSpec, scheme: Scheme) -> None:
    if scheme.group_size and spec.k % scheme.group_size:
        raise MpqError(f"{spec.path} has rows of {spec.k}, no multiple of the groups of {scheme}: allow another scheme")
