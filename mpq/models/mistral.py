"""Mistral: Llama with a sliding window (Jiang et al. 2023, arXiv:2310.06825)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    values = read_like_llama(config, "mistral", {"num_key_value_heads": 8, "sliding_window": 4096})
    return like_llama(values, windows=(values["sliding_window"],) * values["num_hidden_layers"])


FAMILY = decoder_family("mistral", "MistralForCausalLM", parse_config, stored_as())
