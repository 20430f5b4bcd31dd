"""GPT-NeoX and Pythia: parallel blocks, rotary positions on part of a head (arXiv:2204.06745, arXiv:2304.01373)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import REQUIRED, ROPE, decoder_family, read, rope_of, stored_as
from mpq.models.layers import ACTIVATIONS

KEYS: Mapping[str, Any] = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "max_position_embeddings": REQUIRED,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}

NAMES = {
    "embed_tokens": "embed_in",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "norm": "final_layer_norm",
}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    only = {"hidden_act": ACTIVATIONS, "is_decoder": (True, False)}
    neutral = ("classifier_dropout", "hidden_dropout")
    values = read(config, "gpt_neox", dict(ROPE) | dict(KEYS), only=only, neutral=neutral)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=values["max_position_embeddings"],
        norm="layer",
        norm_eps=values["layer_norm_eps"],
        residual="parallel" if values["use_parallel_residual"] else "pre",
        rope=rope_of(values, rope_theta=values["rotary_emb_base"], partial_rotary_factor=values["rotary_pct"]),
        activation=values["hidden_act"],
        mlp="plain",
        qkv="interleaved",
        qkv_bias=values["attention_bias"],
        o_bias=values["attention_bias"],
        mlp_bias=True,
        tie_word_embeddings=values["tie_word_embeddings"],
        bos_token_id=values["bos_token_id"],
    )


FAMILY = decoder_family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    parse_config,
    stored_as(NAMES, prefix="gpt_neox.", head="embed_out"),
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",),  # causal masks
)
