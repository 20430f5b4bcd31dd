"""Gemma 2: norms around each block, soft caps, alternating windows (Gemma Team 2024, arXiv:2408.00118, section 2)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as, windows_of
from mpq.models.layers import ACTIVATIONS

KEYS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
"""Keys that Gemma 2 and 3 have, or for which they have defaults of their own."""

ONLY = {"hidden_activation": ACTIVATIONS, "use_bidirectional_attention": (None, False)}
"""Values that the decoder is right for."""


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = dict(KEYS) | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    values = read_like_llama(config, "gemma2", keys, only=ONLY)
    return gemma(values, windows(values, every=2), attention_softcap=values["attn_logit_softcapping"])


def gemma(values: Mapping[str, Any], windows: tuple[int | None, ...], **description: Any) -> DecoderConfig:
    """What Gemma 2 and 3 have in common."""
    return like_llama(
        values,
        norm="rms_offset",
        residual="sandwich",
        activation=values["hidden_activation"],  # `hidden_act` is in some configs too, and not read
        windows=windows,
        qkv_bias=values["attention_bias"],
        o_bias=values["attention_bias"],
        attention_scale=values["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=values["final_logit_softcapping"],
        embedding_scale=values["hidden_size"] ** 0.5,
        **description,
    )


def windows(values: Mapping[str, Any], every: int) -> tuple[int | None, ...]:
    """The window of every layer: all slide but each `every`th.

    Raises:
      MpqError: `layer_types` does not fit the model.
    """
    layers = values["num_hidden_layers"]
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    return windows_of(values["layer_types"] or kinds, values["sliding_window"], layers)


FAMILY = decoder_family("gemma2", "Gemma2ForCausalLM", parse_config, stored_as())
