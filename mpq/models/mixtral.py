"""Mixtral: Mistral with experts (Jiang et al. 2024, arXiv:2401.04088, section 2)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig, ExpertsConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as

KEYS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

NAMES = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    neutral = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training
    values = read_like_llama(config, "mixtral", KEYS, neutral=neutral)
    layers = values["num_hidden_layers"]
    experts = ExpertsConfig(
        number=values["num_local_experts"],
        per_token=values["num_experts_per_tok"],
        intermediate_size=values["intermediate_size"],
        normalize=True,
        layers=(True,) * layers,
    )
    return like_llama(values, experts=experts, windows=(values["sliding_window"],) * layers)


FAMILY = decoder_family("mixtral", "MixtralForCausalLM", parse_config, stored_as(NAMES))
