"""Every runtime that `mpq export --to` writes for, and the schemes that each has, known before a plan is solved."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from mpq.activations import ActivationScheme, ActivationSpec, ActivationTable
from mpq.config import known
from mpq.export.orbax import Exported
from mpq.gguf import export as gguf
from mpq.gguf.layouts import require_ggml
from mpq.hf import export as hf
from mpq.hf.compressed_tensors import has_rounded_inputs
from mpq.hf.container import Container
from mpq.hf.containers import CONTAINERS
from mpq.hf.inputs import compressed_tensors_of, compressed_tensors_refusal, llm_int8_of, llm_int8_refusal
from mpq.hf.llm_int8 import stored_bits as llm_int8_bits
from mpq.hf.sites import site_of, why_not
from mpq.litert import export as litert
from mpq.litert.activations import pair_refusal as litert_pair_refusal
from mpq.litert.activations import rounding_refusal as litert_rounding_refusal
from mpq.litert.weights import refusal as litert_refusal
from mpq.litert.weights import size_bits as litert_bits
from mpq.onnx import export as onnx
from mpq.onnx.activations import refusal as onnx_rounding_refusal
from mpq.onnx.weights import refusal as onnx_refusal
from mpq.pt2 import export as pt2
from mpq.pt2.activations import refusal as pt2_rounding_refusal
from mpq.pt2.weights import refusal as pt2_refusal
from mpq.types import MpqError, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime's file or folder.

    Attributes:
      what: it is, for a person.
      save: path, quantized model and its name -> bytes written, of a folder those of its weights.
      size_bytes: quantized model and its name -> the same before anything is written.
      refusal: weight and scheme -> why the runtime cannot have it; None where it can.
      uniform: whether all quantized weights must have one scheme.
      stored_bits: weight and scheme -> bits of the weight in the file.
      activations: whether it has a form for rounded activations, too.
      rounds_alike: whether it rounds the inputs of all its int8 weights, in a way that a plan may name.
      options: what `save` takes beside.
      rounding_refusal: activation and scheme -> why a runtime with such forms cannot round it so; None where it can.
      pairs: weight, its scheme and that of its input, None where that stays as it is -> whether a plan that rounds
        activations may have both.
      one_rounding: whether all activations that are rounded must have one scheme.
    """

    what: str
    save: Callable[..., int]
    size_bytes: Callable[[Exported, str], int]
    refusal: Callable[[WeightSpec, Scheme], str | None]
    uniform: bool = False
    stored_bits: Callable[[WeightSpec, Scheme], int] = WeightSpec.size_bits
    activations: bool = False
    rounds_alike: bool = False
    options: tuple[str, ...] = ()
    rounding_refusal: Callable[[ActivationSpec, ActivationScheme], str | None] = lambda row, scheme: None
    pairs: Callable[[WeightSpec, Scheme, ActivationScheme | None], bool] = lambda spec, scheme, activation: True
    one_rounding: bool = False


def _ggml_refusal(spec: WeightSpec, scheme: Scheme) -> str | None:
    try:
        require_ggml(scheme, spec.k)
    except MpqError as error:
        return str(error)
    return None


def _container(what: str, container: Container, uniform: bool = False) -> Target:
    return Target(
        what,
        lambda path, exported, name: hf.save(path, exported, container),
        lambda exported, name: hf.size_bytes(exported, container),
        lambda spec, scheme: why_not(container, spec, site_of(spec), scheme),
        uniform,
    )


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "gguf": Target("a file for llama.cpp", gguf.save, gguf.size_bytes, _ggml_refusal),
        "onnx": Target(
            "a file for ONNX Runtime",
            onnx.save,
            onnx.size_bytes,
            onnx_refusal,
            activations=True,
            options=("kv_cache",),
            rounding_refusal=onnx_rounding_refusal,
        ),
        "litert": Target(
            "a file for LiteRT (TensorFlow Lite)",
            litert.save,
            litert.size_bytes,
            litert_refusal,
            stored_bits=litert_bits,
            activations=True,
            options=("window", "integer"),
            rounding_refusal=litert_rounding_refusal,
            pairs=lambda spec, scheme, by: by is None or litert_pair_refusal(by, spec, scheme) is None,
        ),
        "pt2": Target(
            "a program of torch.export for PyTorch",
            pt2.save,
            pt2.size_bytes,
            pt2_refusal,
            activations=True,
            rounding_refusal=pt2_rounding_refusal,
        ),
        "hf": dataclasses.replace(
            _container("a compressed-tensors folder for transformers and vLLM", CONTAINERS["hf"]),
            save=lambda path, exported, name: hf.save(path, exported, compressed_tensors_of(exported)),
            size_bytes=lambda exported, name: hf.size_bytes(exported, compressed_tensors_of(exported)),
            rounds_alike=True,
            rounding_refusal=compressed_tensors_refusal,
            pairs=lambda spec, scheme, by: has_rounded_inputs(scheme) == (by is not None),
        ),
        "gptq": _container("a GPTQ folder", CONTAINERS["gptq"], uniform=True),
        "gptq_v2": _container("a GPTQ folder of version 2", CONTAINERS["gptq_v2"], uniform=True),
        "awq": _container("an AWQ folder", CONTAINERS["awq"], uniform=True),
        "bnb": _container("a bitsandbytes folder", CONTAINERS["bnb"]),
        "llm_int8": dataclasses.replace(
            _container("a bitsandbytes folder of LLM.int8", CONTAINERS["llm_int8"]),
            save=lambda path, exported, name: hf.save(path, exported, llm_int8_of(exported)),
            stored_bits=llm_int8_bits,
            rounds_alike=True,
            rounding_refusal=llm_int8_refusal,
            pairs=lambda spec, scheme, by: scheme.has_scale == (by is not None),
            one_rounding=True,
        ),
    }
)
"""Name in `mpq export --to` and `mpq allocate --for` -> target."""


def allowed_for(name: str, table: SensitivityTable) -> dict[str, list[Scheme]]:
    """Weight path -> the schemes of the table that the runtime `name` has for it.

    Raises:
      MpqError: an unknown name, or a weight for which it has none of them.
    """
    target = known("format", name, TARGETS)
    allowed: dict[str, list[Scheme]] = {}
    for spec in table.weights:
        reasons = {scheme: target.refusal(spec, scheme) for scheme in table.schemes}
        allowed[spec.path] = [scheme for scheme, reason in reasons.items() if reason is None]
        if not allowed[spec.path]:
            first, reason = next(iter(reasons.items()))
            raise MpqError(
                f"{name} has no form for {spec.path} at any scheme of the table ({first}: {reason}): score bf16 too"
            )
    return allowed


def require_rounding(name: str, tables: Sequence[ActivationTable]) -> None:
    """Refuse activations that the runtime `name` cannot round under a scheme of their table.

    Raises:
      MpqError: an unknown name, or names the activation and the reason.
    """
    target = known("format", name, TARGETS)
    for table in tables:
        for row in table.activations:
            for scheme in table.schemes:
                if reason := target.rounding_refusal(row, scheme):
                    raise MpqError(f"{name} has no form for {row.path} at {scheme}: {reason}; leave it out")
