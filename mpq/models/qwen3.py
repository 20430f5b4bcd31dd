"""Qwen3: Llama with RMS norms on every query and key head (arXiv:2505.09388, section 2)."""

from collections.abc import Mapping
from typing import Any

from mpq.models import qwen2
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = dict(qwen2.WINDOW) | {"head_dim": 128, "attention_bias": False}
    values = read_like_llama(config, "qwen3", keys)
    bias = values["attention_bias"]
    return like_llama(values, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=qwen2.windows(values))


FAMILY = decoder_family("qwen3", "Qwen3ForCausalLM", parse_config, stored_as())
