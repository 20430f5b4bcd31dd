"""Llama 1, 2 and 3, and SmolLM (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783).

The names of `mpq.models.decoders` are Llama's own: a tensor's name in a checkpoint is `model.` + the path here, with
`kernel`, `embedding` and `scale` spelled `weight`, and linear weights transposed: ours are `w[k, n]`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.modules import Decoder
from mpq.models.decoders.reading import decoder_family, like_llama, read_like_llama, stored_as
from mpq.models.decoders.rope import Rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama without biases and rope scaling; the field names are those of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1

    @property
    def decoder(self) -> DecoderConfig:
        """The same, as the decoder reads it."""
        return like_llama(dataclasses.asdict(self) | {"hidden_act": "silu"}, rope=Rope(self.rope_theta))


def Llama(config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> Decoder:
    """A Llama to train: `int32[batch, time]` token ids to `float32[batch, time, vocab]` logits.

    Args:
      config: its shape.
      dtype: type that matmuls compute in; parameters, norms and the residual stream stay float32.
      rngs: for the initial parameters.
    """
    return Decoder(config.decoder, dtype=dtype, rngs=rngs)


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    only = {"is_llama_config": (True,), "rope_interleaved": (False,)}  # SmolLM says so
    values = read_like_llama(config, "llama", {"attention_bias": False, "mlp_bias": False}, only=only)
    bias = values["attention_bias"]
    return like_llama(values, qkv_bias=bias, o_bias=bias, mlp_bias=values["mlp_bias"])


def tensor_name(path: str) -> tuple[str, bool]:
    """Name in the checkpoint of the parameter at `path`, and whether it is transposed there."""
    stored = FAMILY.stored(None, path)
    return stored.names[0], bool(stored.permutation)


FAMILY = decoder_family("llama", "LlamaForCausalLM", parse_config, stored_as())
