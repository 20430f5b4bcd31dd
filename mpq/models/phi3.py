"""Phi-3: Llama with fused projections, and LongRoPE in its long variants (Abdin et al. 2024, arXiv:2404.14219)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, rope_of, stored_as
from mpq.models.decoders.rope import Rope


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096}
    values = read_like_llama(config, "phi3", keys, only={"attention_bias": (False,)})
    return like_llama(
        values,
        qkv="fused",
        mlp="gated_fused",
        windows=(values["sliding_window"],) * values["num_hidden_layers"],
        rope=rope(values),
    )


def rope(values: Mapping[str, Any]) -> Rope:
    """Rotary positions; the original context stands beside them in the config, and counts for LongRoPE alone.

    Raises:
      MpqError: as `parse_rope`.
    """
    key = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    scaling = dict(values[key] or {})
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        scaling["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return rope_of(dict(values) | {key: scaling})


FAMILY = decoder_family("phi3", "Phi3ForCausalLM", parse_config, stored_as())
