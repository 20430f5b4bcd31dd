"""The mixes of types that llama.cpp's own quantizer makes: Q2_K, Q3_K_M, Q4_K_M, Q5_K_M and Q6_K.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` of `src/llama-quant.cpp` in ggml-org/llama.cpp at
007dbbf3fd17eefe9b47fee45f48f7ba5e62b714, for dense models but Falcon. With the base type of the mix for all else:

- the output, or the embedding where it is the output too: Q6_K (Q8_0 where rows do not fill the base's blocks);
- values, and queries, keys and values in one: Q2_K gives Q3_K, or Q4_K if four or more heads share them; Q3_K_M gives
  Q5_K in two layers and Q4_K after them; Q4_K_M and Q5_K_M give Q6_K where `use_more_bits` says; a 70B Llama has Q5_K
  for Q3_K and Q4_K;
- the feed-forward block's second matrix: Q2_K gives Q3_K; Q3_K_M gives Q5_K in the first sixteenth of the layers and
  Q4_K after it; Q4_K_M and Q5_K_M give Q6_K where `use_more_bits` says;
- the projection behind attention: Q2_K gives Q3_K, Q3_K_M gives Q4_K.

Last, where rows do not fill blocks of 256: Q4_0 for Q2_K and Q3_K, Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K; where
they do not fill 32 either, F16.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mpq.formats import parse_scheme
from mpq.gguf.names import gguf_name
from mpq.models.decoders.config import DecoderConfig
from mpq.types import MpqError, Scheme, WeightSpec

MIXES: Mapping[str, str] = MappingProxyType(
    {"Q2_K": "q2_k", "Q3_K_M": "q3_k", "Q4_K_M": "q4_k", "Q5_K_M": "q5_k", "Q6_K": "q6_k"}
)
"""Name in llama.cpp -> base type, the smallest first."""

_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def mix(name: str, weights: Sequence[WeightSpec], decoder: DecoderConfig, model_type: str) -> dict[str, Scheme]:
    """Path -> scheme of a mix.

    Args:
      name: one of `MIXES`, in any case.
      weights: what a trace of the model found.
      decoder: its shape.
      model_type: of its `config.json`.

    Raises:
      MpqError: no such mix, or a weight without a name in GGUF.
    """
    if name.upper() not in MIXES:
        raise MpqError(f"mix {name!r} is none of llama.cpp's that are known here: {', '.join(MIXES)}")
    name = name.upper()
    many = model_type == "llama" and decoder.num_hidden_layers == 80
    large = many and decoder.num_attention_heads != decoder.num_key_value_heads
    found = {}
    for spec in weights:
        tensor = gguf_name(spec.path, decoder.residual == "sandwich")
        kind = _kind(name, tensor, spec.k, decoder, large)
        if not parse_scheme(kind).fits(spec.k):
            kind = _FALLBACK.get(kind, kind)
        found[spec.path] = parse_scheme(kind if parse_scheme(kind).fits(spec.k) else "f16")
    return found


def use_more_bits(layer: int, layers: int) -> bool:
    """Which layers of so many get the larger type: the first and the last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _kind(name: str, tensor: str, k: int, decoder: DecoderConfig, large: bool) -> str:
    """Ggml's type for a tensor, before it is known to fit."""
    base, layers = MIXES[name], decoder.num_hidden_layers
    parts = tensor.split(".")
    if tensor == "output.weight" or (decoder.tie_word_embeddings and tensor == "token_embd.weight"):
        return "q6_k" if parse_scheme(base).fits(k) else "q8_0"
    if parts[0] != "blk":
        return base
    layer, part = int(parts[1]), parts[2]
    more = "q6_k" if use_more_bits(layer, layers) else base
    if part in ("attn_v", "attn_qkv"):
        many = decoder.num_attention_heads // decoder.num_key_value_heads >= 4
        kind = {"Q2_K": "q4_k" if many else "q3_k", "Q3_K_M": "q5_k" if layer < 2 else "q4_k"}.get(name, base)
        kind = more if name in ("Q4_K_M", "Q5_K_M") else kind
        return "q5_k" if large and kind in ("q3_k", "q4_k") else kind
    if part == "ffn_down":
        kind = {"Q2_K": "q3_k", "Q3_K_M": "q5_k" if layer < layers // 16 else "q4_k"}.get(name, base)
        return more if name in ("Q4_K_M", "Q5_K_M") else kind
    if part == "attn_output":
        return {"Q2_K": "q3_k", "Q3_K_M": "q4_k"}.get(name, base)
    return base
