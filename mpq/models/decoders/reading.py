"""From a `config.json` and the names of a checkpoint to a decoder: what the family files share."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mpq.inputs import Tokens
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.modules import Decoder
from mpq.models.decoders.rope import Rope, parse_rope
from mpq.models.family import LINEAR, NEUTRAL_KEYS, Family, Stored, rngs_for_shapes
from mpq.models.layers import ACTIVATIONS
from mpq.types import MpqError

REQUIRED = object()
"""Default of a key that a config must have."""

SHAPE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": REQUIRED,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
    }
)
"""Keys, with their defaults, of the families whose configs are named like Llama's."""

ROPE: Mapping[str, Any] = MappingProxyType(
    {"rope_theta": None, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None}
)
"""Keys of rotary positions: transformers 4 has them apart, version 5 together in `rope_parameters`."""

HARMLESS: Collection[str] = (
    "_attn_implementation_autoset",
    "auto_map",
    "cache_implementation",
    "embd_pdrop",
    "output_attentions",
    "output_hidden_states",
    "resid_pdrop",
    "return_dict",
    "task_specific_params",
)
"""Keys that some checkpoints of these families have and that change no forward pass."""


def read(
    config: Mapping[str, Any],
    family: str,
    keys: Mapping[str, Any],
    *,
    only: Mapping[str, Collection[Any]] = MappingProxyType({}),
    neutral: Collection[str] = (),
) -> dict[str, Any]:
    """The values of `keys`, having refused whatever would change the result unseen.

    Unlike `parse_strictly` it fills no dataclass, and a null stays null: in some keys it is not the default.

    Args:
      config: the `config.json`.
      family: for the messages.
      keys: key -> default; `REQUIRED` where there is none.
      only: key -> values that the decoder is right for, among `keys` or besides them.
      neutral: keys that change nothing.

    Raises:
      MpqError: an unsupported value, an unknown key or a missing one, by name.
    """
    for key, value in config.items():
        if key in only and value not in tuple(only[key]):
            allowed = ", ".join(map(repr, only[key]))
            raise MpqError(f"config key {key!r} is {value!r}: supported is {allowed}")
        if key not in keys and key not in only and key not in neutral and key not in NEUTRAL_KEYS | set(HARMLESS):
            raise MpqError(f"config key {key!r} (value {value!r}) is unknown for {family}: it may change the model")
    values = dict(keys) | {key: config[key] for key in keys if key in config}
    for key, default in keys.items():
        if default is REQUIRED and values[key] in (REQUIRED, None):
            raise MpqError(f"config key {key!r} is missing: {family} needs it")
    return values


def read_like_llama(
    config: Mapping[str, Any],
    family: str,
    keys: Mapping[str, Any] = MappingProxyType({}),
    *,
    only: Mapping[str, Collection[Any]] = MappingProxyType({}),
    neutral: Collection[str] = (),
) -> dict[str, Any]:
    """`read` with the keys of `SHAPE` and `ROPE`, and the heads completed.

    Raises:
      MpqError: as `read`.
    """
    only = {"hidden_act": ACTIVATIONS} | dict(only)
    values = read(config, family, dict(SHAPE) | dict(ROPE) | dict(keys), only=only, neutral=neutral)
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    return values


def like_llama(values: Mapping[str, Any], **description: Any) -> DecoderConfig:
    """The decoder of what `read_like_llama` read; `description` is how it differs from Llama."""
    shared = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_hidden_layers": values["num_hidden_layers"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "max_position_embeddings": values["max_position_embeddings"],
        "activation": values["hidden_act"],
        "norm_eps": values["rms_norm_eps"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "bos_token_id": values["bos_token_id"],
    }
    if "rope" not in description:
        shared["rope"] = rope_of(values)
    return DecoderConfig(**shared | description)


def rope_of(values: Mapping[str, Any], **defaults: Any) -> Rope:
    """The rotary positions that the keys of `ROPE` describe; `defaults` where neither version says otherwise.

    Raises:
      MpqError: as `parse_rope`.
    """
    key = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    apart = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if values.get(name) is not None}
    parameters = defaults | apart | (values[key] or {})
    return parse_rope(parameters, values["max_position_embeddings"], key)


def windows_of(kinds: Sequence[str], window: int | None, layers: int) -> tuple[int | None, ...]:
    """The window of every layer, from `layer_types`.

    Args:
      kinds: `sliding_attention` or `full_attention`, one a layer.
      window: `sliding_window`, tokens, the token itself included.
      layers: how many there are.

    Raises:
      MpqError: another kind, or not one for each layer.
    """
    known = {"sliding_attention": window, "full_attention": None}
    if len(kinds) != layers:
        raise MpqError(f"config key 'layer_types' names {len(kinds)} layers: the model has {layers}")
    if unknown := sorted(set(kinds) - set(known)):
        raise MpqError(f"config key 'layer_types' has {unknown[0]!r}: supported is {', '.join(map(repr, known))}")
    return tuple(known[kind] for kind in kinds)


def stored_as(
    rename: Mapping[str, str] = MappingProxyType({}),
    *,
    prefix: str = "model.",
    layers: str = "layers",
    head: str = "lm_head",
    linear: tuple[int, ...] = LINEAR,
) -> Callable[[Any, str], Stored]:
    """The name map of a family.

    Args:
      rename: our module, such as `self_attn.o_proj`, to the checkpoint's name for it; `{}` in it counts the experts.
      prefix: of every name but the head's.
      layers: name of the list of blocks.
      head: name of the head.
      linear: permutation of a linear weight to ours.

    Returns:
      `Family.stored`.
    """

    def stored(config: Any, path: str) -> Stored:
        module, _, leaf = path.rpartition(".")
        layer = re.match(r"layers\.(\d+)\.", module)
        within = f"{layers}.{layer[1]}." if layer else ""
        module = module[layer.end() :] if layer else module
        name = head if module == "lm_head" else f"{prefix}{within}{rename.get(module, module)}"
        name = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
        number = config.experts.number if "{}" in name else 1
        # a head is a PyTorch linear layer even where the blocks are not
        order = () if leaf != "kernel" else LINEAR if module == "lm_head" else linear
        return Stored(tuple(name.format(expert) for expert in range(number)), order)

    return stored


def decoder_family(
    name: str,
    architecture: str,
    parse: Callable[[Mapping[str, Any]], DecoderConfig],
    stored: Callable[[Any, str], Stored],
    ignored: tuple[str, ...] = (),
    prefix: str = "",
) -> Family:
    """A family of causal language models that `Decoder` computes."""
    return Family(
        name=name,
        architectures={architecture: "causal_lm"},
        parse=parse,
        build=lambda config: Decoder(config, rngs=rngs_for_shapes()),
        stored=stored,
        inputs=lambda config: Tokens(config.max_position_embeddings, bos=config.bos_token_id),
        # a tied head may be stored as well, and old checkpoints keep the constants of rotary positions
        ignored=(r"(.*\.)?(lm_head|embed_out)\.weight", r".*\.rotary_emb\.inv_freq", *ignored),
        prefix=prefix,
    )
