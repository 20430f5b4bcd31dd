"""What a model family is to the checkpoint reader: a config parser, a module builder and a name map."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from flax import nnx

from mpq.types import MpqError

C = TypeVar("C")

# Keys of a `config.json` that do not change what a forward pass computes.
NEUTRAL_KEYS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      name: the `model_type` of its `config.json`.
      architectures: class names it covers in `config["architectures"]`.
      parse: `config.json` to the module's config; raises on every key it does not understand.
      build: config to an NNX module that maps tokens to logits; only ever called under `nnx.eval_shape`.
      tensor_name: parameter path to (name in the checkpoint, whether it is transposed there).
    """

    name: str
    architectures: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any], nnx.Module]
    tensor_name: Callable[[str], tuple[str, bool]]


def parse_strictly(
    config: Mapping[str, Any], into: type[C], *, only: Mapping[str, Collection[Any]], defaults: Mapping[str, Any]
) -> C:
    """Fill the dataclass `into` from `config`, refusing whatever would change the result unseen.

    Args:
      config: the `config.json`.
      into: frozen dataclass whose field names are config keys.
      only: keys that are not fields, with the values the implementation is right for.
      defaults: values for fields that `config` leaves out.

    Raises:
      MpqError: a missing field, an unsupported value, or an unknown key, by name.
    """
    fields = {field.name: field for field in dataclasses.fields(into)}  # type: ignore[arg-type]
    for key, value in config.items():
        if key in only and value not in only[key]:
            allowed = ", ".join(repr(v) for v in only[key])
            raise MpqError(f"config key {key!r} is {value!r}: supported is {allowed}")
        if key not in fields and key not in only and key not in NEUTRAL_KEYS:
            raise MpqError(
                f"config key {key!r} (value {value!r}) is unknown for {into.__name__}: it may change the model"
            )
    values = {key: config[key] for key in fields if config.get(key) is not None}
    values = dict(defaults) | values
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise MpqError(f"config key {name!r} is missing: {into.__name__} needs it")
    return into(**values)
