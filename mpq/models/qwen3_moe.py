"""Qwen3-MoE: Qwen3 with many small experts (arXiv:2505.09388, section 2)."""

from collections.abc import Mapping
from typing import Any

from mpq.models import qwen2_moe
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = dict(qwen2_moe.KEYS) | {
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts": config.get("num_local_experts", 128),  # as transformers 5 writes it
        "num_experts_per_tok": 8,
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    neutral = (*qwen2_moe.NEUTRAL, "num_local_experts")
    values = read_like_llama(config, "qwen3_moe", keys, neutral=neutral)
    bias, window = values["attention_bias"], values["sliding_window"] if values["use_sliding_window"] else None
    return like_llama(
        values,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        experts=qwen2_moe.experts(values, shared_size=None),
        windows=(window,) * values["num_hidden_layers"],
    )


FAMILY = decoder_family("qwen3_moe", "Qwen3MoeForCausalLM", parse_config, stored_as(qwen2_moe.NAMES))
