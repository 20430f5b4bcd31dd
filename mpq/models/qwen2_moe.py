"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with many small experts and a shared one (arXiv:2407.10671, section 2.2.2)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig, ExpertsConfig
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as

KEYS: Mapping[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
}
"""Keys of the experts of Qwen2-MoE, which Qwen3-MoE has too; its defaults."""

NEUTRAL = (
    "max_window_layers",  # without meaning where no window is used
    "output_router_logits",
    "router_aux_loss_coef",
    "sliding_window",
)

NAMES = {
    "mlp.router": "mlp.gate",
    "mlp.experts.gate_proj": "mlp.experts.{}.gate_proj",
    "mlp.experts.up_proj": "mlp.experts.{}.up_proj",
    "mlp.experts.down_proj": "mlp.experts.{}.down_proj",
}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    keys = dict(KEYS) | {"shared_expert_intermediate_size": 5632, "qkv_bias": True}
    everywhere = ["full_attention"] * config.get("num_hidden_layers", 0)
    only = {"use_sliding_window": (False,), "layer_types": (None, everywhere)}
    values = read_like_llama(config, "qwen2_moe", keys, only=only, neutral=NEUTRAL)
    shared = values["shared_expert_intermediate_size"]
    return like_llama(values, qkv_bias=values["qkv_bias"], experts=experts(values, shared))


def experts(values: Mapping[str, Any], shared_size: int | None) -> ExpertsConfig:
    """The sparse layers: each `decoder_sparse_step`th that `mlp_only_layers` does not name."""
    dense = values["mlp_only_layers"] or ()
    sparse = lambda i: i not in dense and (i + 1) % values["decoder_sparse_step"] == 0
    return ExpertsConfig(
        number=values["num_experts"],
        per_token=values["num_experts_per_tok"],
        intermediate_size=values["moe_intermediate_size"],
        normalize=values["norm_topk_prob"],
        layers=tuple(map(sparse, range(values["num_hidden_layers"]))),
        shared_size=shared_size,
    )


FAMILY = decoder_family("qwen2_moe", "Qwen2MoeForCausalLM", parse_config, stored_as(NAMES))
