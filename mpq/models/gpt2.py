"""GPT-2: learned positions, layer norms, fused queries, keys and values (Radford et al. 2019)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import REQUIRED, decoder_family, read, stored_as
from mpq.models.layers import ACTIVATIONS

KEYS: Mapping[str, Any] = {
    "vocab_size": REQUIRED,
    "n_positions": REQUIRED,
    "n_embd": REQUIRED,
    "n_layer": REQUIRED,
    "n_head": REQUIRED,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}

ONLY = {
    "activation_function": ACTIVATIONS,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}

NEUTRAL = (
    "attn_pdrop",
    "n_ctx",  # an old twin of n_positions
    "reorder_and_upcast_attn",  # the same value, in another order
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)

NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "norm": "ln_f",
}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    values = read(config, "gpt2", KEYS, only=ONLY, neutral=NEUTRAL)
    width, heads = values["n_embd"], values["n_head"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["n_inner"] or 4 * width,
        num_hidden_layers=values["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=values["n_positions"],
        norm="layer",
        norm_eps=values["layer_norm_epsilon"],
        rope=None,
        learned_positions=0,
        activation=values["activation_function"],
        mlp="plain",
        qkv="fused",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=values["tie_word_embeddings"],
        bos_token_id=values["bos_token_id"],
    )


FAMILY = decoder_family(
    "gpt2",
    "GPT2LMHeadModel",
    parse_config,
    stored_as(NAMES, prefix="transformer.", layers="h", linear=()),  # its Conv1D keeps [k, n]
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),  # causal masks
    prefix="transformer.",  # which the first checkpoints lack
)
