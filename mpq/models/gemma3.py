"""Gemma 3, text: Gemma 2 with norms of queries and keys, and two bases of rotary positions (arXiv:2503.19786)."""

from collections.abc import Mapping
from typing import Any

from mpq.models import gemma2
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, read_like_llama, stored_as
from mpq.models.decoders.rope import Rope, parse_rope


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = dict(gemma2.KEYS) | {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": config.get("_sliding_window_pattern", 6),
    }
    only = gemma2.ONLY | {"attn_logit_softcapping": (None,)}
    values = read_like_llama(config, "gemma3_text", keys, only=only, neutral=("_sliding_window_pattern",))
    rope, local = ropes(values)
    windows = gemma2.windows(values, every=values["sliding_window_pattern"])
    return gemma2.gemma(values, windows, qk_norm=True, rope=rope, local_rope=local)


def ropes(values: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """Rotary positions of the layers that see all, and of those that slide; only the first are ever scaled.

    Raises:
      MpqError: as `parse_rope`.
    """
    context, nested = values["max_position_embeddings"], values["rope_parameters"] or {}
    whole = {"rope_theta": values["rope_theta"]} | (nested.get("full_attention") or values["rope_scaling"] or {})
    local = {"rope_theta": values["rope_local_base_freq"]} | (nested.get("sliding_attention") or {})
    key = "rope_parameters" if nested else "rope_scaling"
    return parse_rope(whole, context, key), parse_rope(local, context, key)


FAMILY = decoder_family("gemma3_text", "Gemma3ForCausalLM", parse_config, stored_as())
