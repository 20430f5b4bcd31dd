"""Read a model from a folder in the Hugging Face layout, from the hub, or the one that ships with the package."""

import importlib.resources
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from mpq.files import read_json
from mpq.models.family import Family
from mpq.models.model import Model, functional
from mpq.types import MpqError

SHARD_INDEX, SINGLE_FILE, PICKLE = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"


def resolve(source: str) -> Path:
    """The folder that `source` names: `reference`, a folder, or a hub id `owner/name[@revision]`, downloaded.

    Raises:
      MpqError: neither a folder nor a hub id that could be fetched.
    """
    if source == "reference":
        return Path(str(importlib.resources.files("mpq"))) / "assets" / "reference_lm"
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise MpqError(
            f"model {source!r} is no folder here: give a checkpoint folder, a hub id 'owner/name', or 'reference'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        files = ["*.safetensors", "*.json"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MpqError(
            f"model {source!r} is no folder here and could not be fetched from the hub ({reason})"
        ) from error


def load_checkpoint(folder: Path, families: Mapping[str, Family], name: str) -> Model:
    """A model from a folder in the Hugging Face layout.

    Args:
      folder: holds `config.json`, `model.safetensors` (or shards and their index), and usually `tokenizer.json`.
      families: `model_type` -> family.
      name: for a person.

    Raises:
      MpqError: names the file, config key or tensor that is missing, unknown, misshapen or not finite.
    """
    config = read_json(folder / "config.json", "the model's config")
    family = find_family(config, families)
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(family.parse(config))))
    params, stored = read_parameters(folder, family, shapes)
    return make_model(apply, params, stored, config, family, read_tokenizer(folder), name)


def make_model(
    apply: Any,
    params: dict[str, jax.Array],
    stored: Mapping[str, str],
    config: Mapping[str, Any],
    family: Family,
    tokenizer: Tokenizer | None,
    name: str,
) -> Model:
    """Put the parts together; context and BOS come from the parsed config."""
    parsed = family.parse(config)
    bos = parsed.bos_token_id if config.get("bos_token_id") is not None else None
    return Model(apply, params, stored, name, config, tokenizer, parsed.max_position_embeddings, bos)


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


def read_parameters(
    folder: Path, family: Family, shapes: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """All parameters as float32 by path, and the dtype each is stored in, tensor by tensor.

    Raises:
      MpqError: names a tensor that is missing, left over, misshapen, of an unknown dtype, or not finite.
    """
    where = tensor_files(folder)
    wanted = {family.tensor_name(path)[0]: path for path in shapes}
    tied = {"lm_head.weight"} if not any(path.startswith("lm_head") for path in shapes) else set()
    if missing := sorted(set(wanted) - set(where)):
        raise MpqError(
            f"{folder} lacks the tensor {missing[0]!r} ({len(missing)} missing in all): is the checkpoint complete?"
        )
    if left_over := sorted(set(where) - set(wanted) - tied):
        raise MpqError(
            f"{folder} holds the tensor {left_over[0]!r} that its config does not call for ({len(left_over)} in all)"
        )
    params: dict[str, jax.Array] = {}
    stored: dict[str, str] = {}
    for name, tensor in read_tensors({n: f for n, f in where.items() if n in wanted}):
        path = wanted[name]
        transposed = family.tensor_name(path)[1]
        shape = shapes[path].shape[::-1] if transposed else shapes[path].shape
        if tensor.shape != shape:
            raise MpqError(f"tensor {name!r} has shape {tensor.shape}: the config calls for {shape}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise MpqError(f"tensor {name!r} is {tensor.dtype}: supported are float32, float16 and bfloat16")
        value = tensor.astype(np.float32)
        if not np.isfinite(value).all():
            raise MpqError(f"tensor {name!r} holds NaN or infinity: the checkpoint is damaged")
        stored[path] = tensor.dtype.name
        params[path] = jnp.asarray(value.T if transposed else value)
    return {path: params[path] for path in shapes}, {path: stored[path] for path in shapes}


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the shard index or the single file.

    Raises:
      MpqError: no safetensors, a missing shard, or a damaged file.
    """
    if (index := folder / SHARD_INDEX).exists():
        weight_map = read_json(index, "the shard index").get("weight_map", {})
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).exists():
                raise MpqError(f"{folder} lacks the shard {shard!r} that its index names: download it again")
        return {name: folder / shard for name, shard in weight_map.items()}
    file = folder / SINGLE_FILE
    if not file.exists():
        hint = ""
        if (folder / PICKLE).exists():
            hint = (
                f": {PICKLE} is a pickle and unsafe to read; convert it with model.save_pretrained(OUT) of transformers"
            )
        raise MpqError(f"{folder} holds no {SINGLE_FILE} and no {SHARD_INDEX}{hint}")
    with _opened(file) as handle:
        return dict.fromkeys(handle.keys(), file)  # a safetensors handle is not iterable


def read_tensors(where: Mapping[str, Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every named tensor, one at a time, each file memory-mapped once."""
    for file in dict.fromkeys(where.values()):
        with _opened(file) as handle:
            for name in (n for n, f in where.items() if f == file):
                try:
                    yield name, handle.get_tensor(name)
                except SafetensorError as error:
                    raise MpqError(f"{file} cannot give the tensor {name!r} ({error})") from error


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


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise MpqError(f"{file} is truncated or no safetensors file ({error})") from error
