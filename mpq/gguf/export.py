"""A quantized model as a GGUF file that llama.cpp loads: `mpq export OUT --to gguf`.

Every weight is written in the type of ggml that its scheme names, its bytes as they were packed; norms are float32,
which llama.cpp computes them in. For its Llama architecture llama.cpp turns neighbouring features of a head, where the
checkpoint turns feature `i` with `i + dim / 2`: the rows of queries and keys change places, and as blocks lie within
rows, nothing is rounded again.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpq.export.orbax import Exported
from mpq.formats.ggml import FLOAT_TYPES
from mpq.gguf.container import Tensor, Value, predicted_bytes, require_gguf, write
from mpq.gguf.layouts import pack, require_ggml, row_bytes
from mpq.gguf.names import gguf_name
from mpq.gguf.tokenizer import tokenizer_metadata
from mpq.models import FAMILIES, find_family
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.rope import Rope
from mpq.types import MpqError, QTensor, Scheme, WeightSpec

ARCHITECTURES = ("llama",)
"""`model_type` of the models that can be written; llama.cpp has an architecture of the same name."""

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
    return write(path, exported.config["model_type"], metadata(exported, name), tensors(exported))


def size_bytes(exported: Exported, name: str) -> int:
    """Bytes of the file that `save` writes. Raises as it does."""
    return predicted_bytes(exported.config["model_type"], metadata(exported, name), tensors(exported))


def metadata(exported: Exported, name: str) -> dict[str, Value]:
    """Keys and values beside the architecture.

    Raises:
      MpqError: the architecture, its rotary positions or the tokenizer have no counterpart in llama.cpp.
    """
    arch, decoder = _decoder(exported.config)
    assert decoder.rope is not None
    if exported.tokenizer_json is None:
        raise MpqError("the model has no tokenizer.json, and llama.cpp reads the tokenizer from the GGUF file: add one")
    eos = exported.config.get("eos_token_id")
    values: dict[str, Value] = {
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{arch}.vocab_size": decoder.vocab_size,
        f"{arch}.context_length": decoder.max_position_embeddings,
        f"{arch}.embedding_length": decoder.hidden_size,
        f"{arch}.block_count": decoder.num_hidden_layers,
        f"{arch}.feed_forward_length": decoder.intermediate_size,
        f"{arch}.attention.head_count": decoder.num_attention_heads,
        f"{arch}.attention.head_count_kv": decoder.num_key_value_heads,
        f"{arch}.attention.key_length": decoder.head_dim,
        f"{arch}.attention.value_length": decoder.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(decoder.norm_eps),
        f"{arch}.rope.dimension_count": decoder.head_dim,
        f"{arch}.rope.freq_base": float(decoder.rope.theta),
    }
    last = eos[0] if isinstance(eos, list) else eos
    return values | tokenizer_metadata(exported.tokenizer_json, decoder.vocab_size, last)


def tensors(exported: Exported) -> list[Tensor]:
    """The tensors of the file, in the order of the model's parameters.

    Raises:
      MpqError: a parameter has no name in GGUF, or a weight a scheme that ggml has not.
    """
    _, decoder = _decoder(exported.config)
    specs = {spec.param: spec for spec in exported.weights}
    found: list[Tensor] = []
    for path in exported.shapes:
        if path in specs:
            found.append(_weight(specs[path], exported.qtensors[specs[path].path], decoder))
        else:
            value = np.asarray(exported.params[path], np.float32)
            found.append(Tensor(gguf_name(path), "f32", value.shape, value.nbytes, lambda value=value: value))
    return found


def _weight(spec: WeightSpec, qtensor: QTensor, decoder: DecoderConfig) -> Tensor:
    name, scheme = gguf_name(spec.path), qtensor.scheme
    try:
        require_ggml(scheme, spec.k)
    except MpqError as error:
        raise MpqError(f"weight {spec.path} cannot be written: {error}") from error
    heads = {"attn_q": decoder.num_attention_heads, "attn_k": decoder.num_key_value_heads}.get(name.split(".")[-2])

    def data() -> np.ndarray:
        parts = {part: np.asarray(getattr(qtensor, part))[0] for part in scheme.part_bits(spec.k, spec.n)}
        rows = pack(parts, scheme)
        return rows if heads is None else np.ascontiguousarray(rows[interleaved(heads, decoder.head_dim)])

    return Tensor(name, kind_of(scheme), (spec.n, spec.k), spec.n * row_bytes(scheme, spec.k), data)


def kind_of(scheme: Scheme) -> str:
    """Ggml's name of the type of a scheme that `require_ggml` takes."""
    return str(scheme) if scheme.blocks is not None else FLOAT_TYPES[str(scheme)]


def interleaved(heads: int, head_dim: int) -> np.ndarray:
    """`int64[heads * head_dim]`: which row of the checkpoint each row of the file is."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _decoder(config: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    arch = config.get("model_type")
    if arch not in ARCHITECTURES:
        raise MpqError(f"models of type {arch!r} have no mapping to GGUF yet: it takes {', '.join(ARCHITECTURES)}")
    decoder = find_family(config, FAMILIES).parse(config)
    if decoder.rope != Rope(decoder.rope.theta):
        raise MpqError("scaled or partial rotary positions have no mapping to GGUF yet: export a model without them")
    return arch, decoder
