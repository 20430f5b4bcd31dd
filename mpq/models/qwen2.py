"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (arXiv:2407.10671, arXiv:2412.15115)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as, windows_of

WINDOW: Mapping[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
"""Keys of Qwen's sliding windows, with their defaults."""


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    values = read_like_llama(config, "qwen2", WINDOW, only={"use_mrope": (False,)})
    return like_llama(values, qkv_bias=True, windows=windows(values))


def windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of every layer: from layer `max_window_layers` on, where windows are used at all.

    Raises:
      MpqError: `layer_types` does not fit the model.
    """
    layers = values["num_hidden_layers"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    slides = lambda i: window is not None and i >= values["max_window_layers"]
    kinds = ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)]
    return windows_of(values["layer_types"] or kinds, window, layers)


FAMILY = decoder_family("qwen2", "Qwen2ForCausalLM", parse_config, stored_as())
