"""Read a model from a folder in the Hugging Face layout, with safetensors or an Orbax checkpoint; write the latter."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from mpq.export.orbax import write_checkpoint
from mpq.files import canonical_json, read_json, writing
from mpq.finite import all_finite
from mpq.hf.reading import QuantizedTensors, split_config
from mpq.inputs import Tokens
from mpq.models.decoders import DecoderConfig
from mpq.models.family import Family, Stored
from mpq.models.model import Model, functional
from mpq.models.tensors import FLOATS, ORBAX, SHARD_INDEX, SINGLE_FILE, OrbaxArrays, Tensors, find_tensors, nest
from mpq.tasks import TASKS
from mpq.types import MpqError, Scheme

SIDECARS = {
    "preprocessor": "preprocessor_config.json",
    "modules": "modules.json",
    "pooling": "1_Pooling/config.json",
}
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FLOATS.values()}
"""Dtypes in which parameters may be stored, by name."""
CHAT_TEMPLATE, CHAT_TEMPLATE_FILE = "chat_template", "chat_template.jinja"
_ALIGNMENT = 64
"""Bytes. XLA takes NumPy's memory as its own where it is aligned so, and copies it otherwise."""


def load_checkpoint(folder: Path, families: Mapping[str, Family], name: str) -> Model:
    """A model from a folder.

    Peak memory is that of the float32 parameters and of the largest tensor as it is stored.

    Args:
      folder: holds `config.json`; `model.safetensors`, or shards and their index, or an Orbax checkpoint of the
        parameters by path in `params/`; and usually `tokenizer.json`.
      families: `model_type` -> family.
      name: for a person.

    Raises:
      MpqError: names the file, config key or tensor that is missing, unknown, misshapen or not finite.
    """
    config, quantization = split_config(read_config(folder))
    family = find_family(config, families)
    parsed = family.parse(config)
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(parsed)))
    tensors = _tensors(folder, quantization)
    if tensors is None:
        raise MpqError(f"{folder} holds no {SINGLE_FILE}, no {SHARD_INDEX} and no Orbax checkpoint {ORBAX}/")
    wanted, dtypes = match(tensors, family, parsed, shapes)
    params = {path: _read(tensors, wanted[path], tuple(shape.shape)) for path, shape in shapes.items()}
    model = make_model(apply, params, dtypes, config, family, read_tokenizer(folder), name)
    return dataclasses.replace(model, schemes=_schemes(tensors, wanted))


def abstract_checkpoint(source: Path, families: Mapping[str, Family], name: str) -> Model:
    """A model whose parameters are shapes: it can be traced and sized, not run. No weight is read.

    Args:
      source: a folder as `load_checkpoint` reads it, or one without weights, or a `config.json` under any name. Where
        there are weights, their names, shapes and dtypes are read and checked; else the dtype is the config's.
      families: `model_type` -> family.
      name: for a person.

    Raises:
      MpqError: names the config key or tensor that is missing, unknown or misshapen.
    """
    whole = source.is_dir()
    config, quantization = split_config(read_config(source) if whole else read_json(source, "the model's config"))
    family = find_family(config, families)
    parsed = family.parse(config)
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(parsed)))
    tensors, schemes = _tensors(source, quantization) if whole else None, {}
    if tensors is not None:
        wanted, dtypes = match(tensors, family, parsed, shapes)
        schemes = _schemes(tensors, wanted)
    else:
        dtypes = dict.fromkeys(shapes, _config_dtype(config))
    model = make_model(apply, shapes, dtypes, config, family, read_tokenizer(source) if whole else None, name)
    return dataclasses.replace(model, schemes=schemes)


def _tensors(folder: Path, quantization: Mapping[str, Any] | None) -> Tensors | None:
    """The weights in `folder`, those of a quantized checkpoint dequantized as they are read."""
    tensors = find_tensors(folder)
    return tensors if quantization is None or tensors is None else QuantizedTensors(tensors, quantization)


def _schemes(tensors: Tensors, wanted: Mapping[str, Stored]) -> dict[str, Scheme]:
    """How a quantized checkpoint stores its parameters, where it is not as plain floats."""
    if not isinstance(tensors, QuantizedTensors):
        return {}
    schemes = {path: tensors.scheme(stored.names[0]) for path, stored in wanted.items()}
    return {path: scheme for path, scheme in schemes.items() if scheme is not None}


def save_orbax(model: Model, folder: Path) -> None:
    """Write `model` as `config.json`, `tokenizer.json` and an Orbax checkpoint of its parameters, nested by path.

    `load` reads it back bit by bit, and any Flax program with `StandardCheckpointer().restore(folder / "params")`.
    Every parameter is written in the dtype that it was stored in. The folder appears whole or not at all, and equal
    models give equal bytes.

    Raises:
      MpqError: the model has no config that it could be read back with, or the disk is full or refuses.
    """
    if not model.config:
        raise MpqError(
            f"model {model.name!r} has no config.json, without which it cannot be read back: save its params"
        )
    with writing(folder) as sibling:
        sibling.mkdir()
        write_config(sibling, model.config)
        if model.tokenizer is not None:
            (sibling / "tokenizer.json").write_bytes(model.tokenizer.to_str().encode())
        arrays = {path: jax.numpy.asarray(p).astype(DTYPES[model.stored[path]]) for path, p in model.params.items()}
        write_checkpoint(sibling / ORBAX, nest(arrays))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, and under the keys of `SIDECARS` the files beside it that decide what the model computes.

    The chat template, which is kept for exports, is under `CHAT_TEMPLATE`.

    Raises:
      MpqError: no `config.json`, or a file that is not JSON.
    """
    config = read_json(folder / "config.json", "the model's config")
    for key, file in SIDECARS.items():
        if (folder / file).exists():
            config[key] = read_json(folder / file, f"the model's {key}", list if key == "modules" else dict)
    if template := _chat_template(folder):
        config[CHAT_TEMPLATE] = template
    return config


def _chat_template(folder: Path) -> str | None:
    """The Jinja text that makes one text of a chat: a file of its own, or a part of `tokenizer_config.json`."""
    if (folder / CHAT_TEMPLATE_FILE).exists():
        return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        return None
    found = read_json(folder / "tokenizer_config.json", "the tokenizer's config").get(CHAT_TEMPLATE)
    if isinstance(found, list):  # several by name
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write what `read_config` reads into an existing folder."""
    for key in set(SIDECARS) & set(config):
        (folder / SIDECARS[key]).parent.mkdir(exist_ok=True)
        (folder / SIDECARS[key]).write_text(canonical_json(config[key]))
    if template := config.get(CHAT_TEMPLATE):
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    plain = {key: value for key, value in config.items() if key not in {*SIDECARS, CHAT_TEMPLATE}}
    (folder / "config.json").write_text(canonical_json(plain))


def make_model(
    apply: Any,
    params: Mapping[str, Any],
    stored: Mapping[str, str],
    config: Mapping[str, Any],
    family: Family,
    tokenizer: Tokenizer | None,
    name: str,
) -> Model:
    """Put the parts together."""
    parsed = family.parse(config)
    inputs = family.inputs(parsed)
    if isinstance(inputs, Tokens):
        bos = first_token(tokenizer) if tokenizer is not None else inputs.bos
        inputs = dataclasses.replace(inputs, bos=bos if config.get("bos_token_id") is not None else None)
    task = family.architectures[config["architectures"][0]]
    if task == "classification" and getattr(parsed, "num_labels", None) == 1:
        task = "regression"  # what transformers trains a single output for
    decoder = parsed if isinstance(parsed, DecoderConfig) else None
    return Model(apply, dict(params), stored, name, inputs, TASKS[task], config, tokenizer, decoder=decoder)


def first_token(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer puts in front of a text, or None: a config may name a BOS that no text begins with."""
    ids = tokenizer.encode("").ids
    return ids[0] if ids else None


def find_family(config: Mapping[str, Any], families: Mapping[str, Family]) -> Family:
    """The family of a `config.json`.

    Raises:
      MpqError: the architecture is not supported; lists those that are.
    """
    family = families.get(str(config.get("model_type")))
    given = config.get("architectures") or ["(none)"]
    if family is None or given[0] not in family.architectures:
        supported = ", ".join(a for f in families.values() for a in f.architectures)
        raise MpqError(
            f"architecture {given[0]!r} (model_type {config.get('model_type')!r}) is unknown: supported is {supported}"
        )
    return family


def match(
    tensors: Tensors, family: Family, parsed: Any, shapes: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where each parameter is stored, and in which dtype, after names, shapes and dtypes have been checked.

    Raises:
      MpqError: names a tensor that is missing, left over, misshapen, or of a dtype that is not read.
    """
    own = isinstance(tensors, OrbaxArrays)  # it has our paths and our layout
    wanted = {path: Stored((path,)) if own else family.stored(parsed, path) for path in shapes}
    if family.prefix and not any(name.startswith(family.prefix) for name in tensors.names):
        wanted = {path: Stored(_without(family.prefix, s.names), s.permutation) for path, s in wanted.items()}
    named = {name for stored in wanted.values() for name in stored.names}
    if missing := sorted(named - tensors.names):
        raise MpqError(
            f"{tensors.folder} lacks the tensor {missing[0]!r} ({len(missing)} missing in all): "
            "is the checkpoint complete?"
        )
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in family.ignored) or r"(?!)")
    if left_over := sorted(name for name in tensors.names - named if not ignored.fullmatch(name)):
        raise MpqError(
            f"{tensors.folder} holds the tensor {left_over[0]!r} that its config does not call for "
            f"({len(left_over)} in all)"
        )
    dtypes = {path: _dtype(tensors, stored, tuple(shapes[path].shape)) for path, stored in wanted.items()}
    return wanted, dtypes


def _without(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in names)


def _dtype(tensors: Tensors, stored: Stored, shape: tuple[int, ...]) -> str:
    """Dtype of the tensors of one parameter, the widest if there are several."""
    one = shape[1:] if _is_stacked(stored, shape) else shape
    if one is not shape and shape[0] != len(stored.names):
        raise MpqError(
            f"the config calls for {shape[0]} tensors like {stored.names[0]!r}: {len(stored.names)} are named"
        )
    order = stored.permutation or tuple(range(len(one)))
    expected = tuple(one[order.index(axis)] for axis in range(len(one)))
    headers = [tensors.header(name) for name in stored.names]
    for name, header in zip(stored.names, headers, strict=True):
        if header.shape != expected:
            raise MpqError(f"tensor {name!r} has shape {header.shape}: the config calls for {expected}")
        if header.dtype not in DTYPES:
            raise MpqError(f"tensor {name!r} is {header.dtype}: supported are float32, float16 and bfloat16")
    return max((header.dtype for header in headers), key=lambda dtype: DTYPES[dtype].itemsize)


def _is_stacked(stored: Stored, shape: tuple[int, ...]) -> bool:
    return len(stored.names) > 1 or len(shape) > len(stored.permutation or shape)


def _read(tensors: Tensors, stored: Stored, shape: tuple[int, ...]) -> jax.Array:
    """One parameter, float32. Slab by slab each value is checked, converted and written once into its own memory."""
    value = _aligned(shape)
    parts = value if _is_stacked(stored, shape) else value[None]
    for part, name in zip(parts, stored.names, strict=True):
        order = stored.permutation or tuple(range(part.ndim))
        as_stored = part.transpose(np.argsort(order))
        for rows, slab in tensors.slabs(name):
            if not all_finite(slab):
                raise MpqError(f"tensor {name!r} holds NaN or infinity: the checkpoint is damaged")
            as_stored[rows].transpose(order)[...] = _transposed(slab, order)
    return jax.device_put(value)


def _transposed(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """`array.transpose(order)` in C order. XLA's transposition works in blocks; NumPy's misses the cache throughout."""
    if order == tuple(range(len(order))):
        return array
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return array.transpose(order)
    return np.asarray(jax.device_put(array.transpose(order), cpu))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialized float32 memory that JAX need not copy."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


def _config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names for its weights; float32, as for transformers, where it names none."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise MpqError(f"config key 'dtype' is {dtype!r}: supported are float32, float16 and bfloat16")
    return dtype


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's `tokenizer.json`, or None where there is none.

    Raises:
      MpqError: the file is there and cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return Tokenizer.from_str(json.dumps(read_json(file, "the tokenizer")))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise MpqError(f"{file} is no tokenizer that the tokenizers package can read ({error})") from error
