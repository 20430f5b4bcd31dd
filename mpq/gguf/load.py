"""A GGUF file as a `Model`: other people's files can be measured, inspected and quantized again like any checkpoint.

Weights come decoded, in float32; what a type of ggml stands for is exact there. The config is the one of the family in
the Hugging Face layout that computes what llama.cpp does (`mpq.gguf.architectures`), the tokenizer one that gives
the tokens that llama.cpp gives (`mpq.gguf.tokenizer_of`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from mpq.gguf.architectures import Architecture, architecture_named, head_order
from mpq.gguf.names import ROPE_DIVISORS, gguf_name
from mpq.gguf.reader import GgufFile, Stored, read
from mpq.gguf.tokenizer_of import chat_template, special_ids, tokenizer_of
from mpq.models.checkpoint import find_family, make_model
from mpq.models.decoders.config import DecoderConfig
from mpq.models.family import Family
from mpq.models.model import Model, functional
from mpq.types import MpqError


def load_gguf(path: str, families: Mapping[str, Family]) -> Model:
    """The model of a file.

    Peak memory is that of the float32 parameters and of the largest tensor.

    Args:
      path: of the file.
      families: `model_type` -> family.

    Raises:
      MpqError: the file is damaged, or holds an architecture, a key, a tensor, a type or a tokenizer that is not known;
        names it.
    """
    opened = open_gguf(path, families)
    params = {name: jax.device_put(opened.value(name)) for name in opened.shapes}
    return opened.model(params, Path(path).name)


def load_gguf_shapes(path: str, families: Mapping[str, Family]) -> Model:
    """The same with shapes for parameters: to be traced and sized, not run. No tensor is decoded. Raises as it does."""
    opened = open_gguf(path, families)
    return opened.model(dict(opened.shapes), Path(path).name)


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A file of which all names and shapes are known to fit.

    Attributes:
      file: the file.
      architecture: llama.cpp's.
      family: that computes it.
      config: its `config.json`.
      shapes: of every parameter by path.
      stored: tensor of every parameter by path.
    """

    file: GgufFile
    architecture: Architecture
    family: Family
    config: dict[str, Any]
    shapes: Mapping[str, Any]
    stored: Mapping[str, Stored]

    @property
    def decoder(self) -> DecoderConfig:
        """The config, parsed."""
        return self.family.parse(self.config)

    def value(self, path: str) -> np.ndarray:
        """One parameter in the checkpoint's own order and layout, float32.

        Raises:
          MpqError: its type cannot be decoded, or a value is NaN or infinite.
        """
        rows = self.stored[path].values()
        if (order := head_order(path, self.decoder, self.architecture)) is not None:
            rows = rows[np.argsort(order)]
        if path.endswith("norm.scale"):
            rows = rows - np.float32(self.architecture.norm_offset)
        return np.ascontiguousarray(rows.T) if path.endswith(".kernel") else rows

    def model(self, params: Mapping[str, Any], name: str) -> Model:
        """The model with these parameters.

        Raises:
          MpqError: the file's tokenizer cannot be rebuilt.
        """
        apply, _ = _function(self.family, self.config)
        dtypes = {path: tensor.dtype for path, tensor in self.stored.items()}
        text = tokenizer_of(self.file.metadata)
        tokenizer = None if text is None else Tokenizer.from_str(text)
        return make_model(apply, params, dtypes, self.config, self.family, tokenizer, name)


def open_gguf(path: str, families: Mapping[str, Family]) -> Opened:
    """Read what a file says of itself, and hold its tensors against it.

    Raises:
      MpqError: as `load_gguf`, but for values and tokenizer.
    """
    file = read(path)
    try:
        return _open(file, families)
    except MpqError as error:
        raise MpqError(f"{path} cannot be read: {error}") from error


def _open(file: GgufFile, families: Mapping[str, Family]) -> Opened:
    architecture = architecture_named(file.architecture)
    divisors = file.tensors.get(ROPE_DIVISORS)
    config = architecture.config(file.metadata, None if divisors is None else tuple(divisors.values().tolist()))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise MpqError("it lacks the tensor 'token_embd.weight': is the file complete?")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= special_ids(file.metadata)
    if template := chat_template(file.metadata):
        config["chat_template"] = template
    family = find_family(config, families)
    parsed = family.parse(config)
    _, shapes = _function(family, config)
    names = {name: gguf_name(name, parsed.residual == "sandwich") for name in shapes}
    if missing := [tensor for tensor in names.values() if tensor not in file.tensors]:
        raise MpqError(f"it lacks the tensor {missing[0]!r} ({len(missing)} in all): is the file complete?")
    if left := sorted(set(file.tensors) - set(names.values()) - {ROPE_DIVISORS}):
        raise MpqError(f"it holds the tensor {left[0]!r}, which the model has no place for ({len(left)} in all)")
    for name, tensor in names.items():
        shape = tuple(shapes[name].shape)
        want = shape[::-1] if name.endswith(".kernel") else shape
        if file.tensors[tensor].shape != want:
            got = list(file.tensors[tensor].shape)
            raise MpqError(f"the tensor {tensor!r} is {got}: its keys call for {list(want)}")
    return Opened(file, architecture, family, config, shapes, {n: file.tensors[t] for n, t in names.items()})


def _function(family: Family, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return functional(nnx.eval_shape(lambda: family.build(family.parse(config))))
