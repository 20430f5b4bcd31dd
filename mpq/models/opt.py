"""OPT: learned positions that begin at two, ReLU, norms before or after (Zhang et al. 2022, arXiv:2205.01068)."""

from collections.abc import Mapping
from typing import Any

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.reading import REQUIRED, decoder_family, read, stored_as
from mpq.models.layers import ACTIVATIONS

KEYS: Mapping[str, Any] = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "ffn_dim": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "max_position_embeddings": REQUIRED,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}

NAMES = {
    "self_attn.o_proj": "self_attn.out_proj",
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
    "norm": "final_layer_norm",
}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    only = {"activation_function": ACTIVATIONS, "layer_norm_elementwise_affine": (True,)}
    neutral = ("activation_dropout", "dropout", "init_std", "layerdrop", "prefix")
    values = read(config, "opt", KEYS, only=only, neutral=neutral)
    width, heads, narrow = values["hidden_size"], values["num_attention_heads"], values["word_embed_proj_dim"]
    before, bias = values["do_layer_norm_before"], values["enable_bias"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["ffn_dim"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=values["max_position_embeddings"],
        norm="layer",
        norm_eps=1e-5,
        residual="pre" if before else "post",
        final_norm=before and not values["_remove_final_layer_norm"],
        rope=None,
        learned_positions=2,  # the table begins with two rows for padding (fairseq)
        activation=values["activation_function"],
        mlp="plain",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        embedding_size=narrow if narrow not in (None, width) else None,
        tie_word_embeddings=values["tie_word_embeddings"],
        bos_token_id=values["bos_token_id"],
    )


FAMILY = decoder_family(
    "opt", "OPTForCausalLM", parse_config, stored_as(NAMES, prefix="model.decoder."), prefix="model."
)
