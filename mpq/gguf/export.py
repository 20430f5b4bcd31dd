"""A quantized model as a GGUF file that llama.cpp loads: `mpq export OUT --to gguf`.

Every weight is written in the type of ggml that its scheme names, its bytes as they were packed; norms are float32,
which llama.cpp computes them in. For its Llama architecture llama.cpp turns neighbouring features of a head, where the
checkpoint turns feature `i` with `i + dim / 2`: the rows of queries and keys change places, and as blocks lie within
rows, nothing is rounded again. What else differs between the two is in `mpq.gguf.architectures`.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpq.export.orbax import Exported
from mpq.formats.ggml import FLOAT_TYPES
from mpq.gguf.architectures import Architecture, architecture_of, head_order, rope_divisors
from mpq.gguf.container import Tensor, Value, predicted_bytes, require_gguf, write
from mpq.gguf.layouts import pack, require_ggml, row_bytes
from mpq.gguf.names import ROPE_DIVISORS, gguf_name
from mpq.gguf.tokenizer import tokenizer_metadata
from mpq.models import FAMILIES, Model, find_family
from mpq.models.checkpoint import DTYPES
from mpq.models.decoders.config import DecoderConfig
from mpq.types import MpqError, QTensor, Scheme, WeightSpec

_QUANTIZATION_VERSION = 2  # of ggml's blocks, since 2023


def save(path: str | os.PathLike[str], exported: Exported, name: str) -> int:
    """Write the file, whole or not at all.

    Args:
      path: of the file.
      exported: a quantized model, as `mpq.export.orbax.load` reads it.
      name: of the model, for a person.

    Returns:
      Its size in bytes, which is `size_bytes`.

    Raises:
      MpqError: the architecture, a scheme or the tokenizer has no counterpart in llama.cpp, the `gguf` package is not
        installed, or the disk is full or refuses.
    """
    require_gguf()
    return write(path, architecture_of(exported.config).name, metadata(exported, name), tensors(exported))


def size_bytes(exported: Exported, name: str, choice: Mapping[str, Scheme] | None = None) -> int:
    """Bytes of the file that `save` writes; with `choice`, were the weights at these schemes. Raises as it does."""
    return predicted_bytes(architecture_of(exported.config).name, metadata(exported, name), tensors(exported, choice))


def in_memory(model: Model, weights: tuple[WeightSpec, ...], qtensors: Mapping[str, QTensor]) -> Exported:
    """What `mpq.export.orbax` would write and read back, without the disk; for sizes alone `qtensors` may be empty."""
    covered = {spec.param for spec in weights}
    kept = {
        path: np.asarray(param.astype(DTYPES[model.stored[path]]))
        for path, param in model.params.items()
        if path not in covered
    }
    shapes = {path: (tuple(param.shape), str(param.dtype)) for path, param in model.params.items()}
    tokenizer = None if model.tokenizer is None else model.tokenizer.to_str()
    return Exported({}, dict(model.config), tokenizer, weights, dict(qtensors), kept, shapes)


def metadata(exported: Exported, name: str) -> dict[str, Value]:
    """Keys and values beside the architecture.

    Raises:
      MpqError: the architecture, a part of it or the tokenizer has no counterpart in llama.cpp.
    """
    architecture, decoder = _decoder(exported)
    if exported.tokenizer_json is None:
        raise MpqError("the model has no tokenizer.json, and llama.cpp reads the tokenizer from the GGUF file: add one")
    eos = exported.config.get("eos_token_id")
    values = {"general.name": name, "general.quantization_version": _QUANTIZATION_VERSION}
    values |= architecture.metadata(decoder)
    values |= tokenizer_metadata(exported.tokenizer_json, decoder.vocab_size, eos[0] if isinstance(eos, list) else eos)
    template = exported.config.get("chat_template")
    return values | ({} if template is None else {"tokenizer.chat_template": template})


def tensors(exported: Exported, choice: Mapping[str, Scheme] | None = None) -> list[Tensor]:
    """The tensors of the file, in the order of the model's parameters.

    Args:
      exported: a quantized model.
      choice: path -> scheme; then the quantized weights are not needed before a tensor's data are.

    Raises:
      MpqError: a parameter has no name in GGUF, or a weight a scheme that ggml has not.
    """
    architecture, decoder = _decoder(exported)
    specs = {spec.param: spec for spec in exported.weights}
    found: list[Tensor] = []
    for path in exported.shapes:
        name, order = gguf_name(path, decoder.residual == "sandwich"), head_order(path, decoder, architecture)
        if path in specs:
            spec = specs[path]
            scheme = exported.qtensors[spec.path].scheme if choice is None else choice[spec.path]
            found.append(_weight(name, spec, scheme, exported.qtensors, order))
        else:
            found.append(_float32(name, np.asarray(exported.params[path], np.float32), path, architecture))
    if (divisors := rope_divisors(decoder)) is not None:
        found.append(_float32(ROPE_DIVISORS, np.asarray(divisors, np.float32), "", architecture))
    return found


def _float32(name: str, value: np.ndarray, path: str, architecture: Architecture) -> Tensor:
    if path.endswith("norm.scale"):
        value = value + np.float32(architecture.norm_offset)
    return Tensor(name, "f32", value.shape, value.nbytes, lambda: value)


def _weight(
    name: str, spec: WeightSpec, scheme: Scheme, qtensors: Mapping[str, QTensor], order: np.ndarray | None
) -> Tensor:
    try:
        require_ggml(scheme, spec.k)
    except MpqError as error:
        raise MpqError(f"weight {spec.path} cannot be written: {error}") from error

    def data() -> np.ndarray:
        stored = scheme.part_bits(spec.k, spec.n)
        parts = {part: np.asarray(getattr(qtensors[spec.path], part))[0] for part in stored}
        rows = pack(parts, scheme)
        return rows if order is None else np.ascontiguousarray(rows[order])

    return Tensor(name, kind_of(scheme), (spec.n, spec.k), spec.n * row_bytes(scheme, spec.k), data)


def kind_of(scheme: Scheme) -> str:
    """Ggml's name of the type of a scheme that `require_ggml` takes."""
    return str(scheme) if scheme.blocks is not None else FLOAT_TYPES[str(scheme)]


def decoder_of(config: Mapping[str, Any]) -> DecoderConfig:
    """The shape of a model that GGUF has a place for.

    Raises:
      MpqError: it has none.
    """
    architecture_of(config)
    return find_family(config, FAMILIES).parse(config)


def _decoder(exported: Exported) -> tuple[Architecture, DecoderConfig]:
    return architecture_of(exported.config), decoder_of(exported.config)
