"""What distinguishes one decoder family from another, as data."""

import dataclasses
from typing import Literal

from mpq.models.decoders.rope import Rope


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Sparse feed-forward layers: a router sends every token to a few of many experts.

    Attributes:
      number: experts a layer.
      per_token: experts that a token is sent to.
      intermediate_size: of each expert.
      normalize: divide the weights of the chosen experts by their sum.
      layers: which layers have experts; the others are dense.
      shared_size: intermediate size of the expert that every token passes, or None.
    """

    number: int
    per_token: int
    intermediate_size: int
    normalize: bool
    layers: tuple[bool, ...]
    shared_size: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal transformer decoder. The defaults are those of Llama.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim:
        its shape.
      max_position_embeddings: longest window, tokens.
      norm: `rms`; `rms_offset`, which stores scale - 1; or `layer`, with a bias.
      norm_eps: added to the variance.
      residual: where the norms are. `pre`: before attention and before the feed-forward block; `sandwich`: after each
        as well; `post`: after each sum; `parallel`: both blocks read the same residual stream, each by its own norm.
      final_norm: a norm before the head.
      rope: rotary positions, or None.
      local_rope: of the layers with a sliding window, or None where they share `rope`.
      learned_positions: offset of the first position in a learned table, or None where there is no table.
      windows: of each layer how many tokens it sees, itself included; None: all before it. Empty: no layer slides.
      activation: name in `mpq.models.layers.ACTIVATIONS`.
      mlp: `gated`, with separate gate and up; `gated_fused`, one matmul for both, gate first; or `plain`.
      qkv: `separate`; `fused`, one matmul, all queries first; or `interleaved`, one matmul, head by head.
      qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
      qk_norm: RMS norms over the features of every query and key head.
      attention_scale: factor on the attention scores; None: head_dim**-0.5.
      attention_softcap, logit_softcap: bounds `c` of `c * tanh(score / c)`, or None.
      embedding_scale: factor on the embedding, not on the head.
      embedding_size: width of the embedding where it differs from `hidden_size`, with a projection on either side.
      experts: of the sparse layers, or None.
      tie_word_embeddings: the head is the embedding.
      bos_token_id: or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    norm_eps: float = 1e-5
    residual: Literal["pre", "sandwich", "post", "parallel"] = "pre"
    final_norm: bool = True
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    learned_positions: int | None = None
    windows: tuple[int | None, ...] = ()
    activation: str = "silu"
    mlp: Literal["gated", "gated_fused", "plain"] = "gated"
    qkv: Literal["separate", "fused", "interleaved"] = "separate"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    embedding_size: int | None = None
    experts: ExpertsConfig | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None

    def window(self, layer: int) -> int | None:
        """How many tokens layer number `layer` sees, or None."""
        return self.windows[layer] if self.windows else None

    def positions(self, layer: int) -> Rope | None:
        """The rotary positions of layer number `layer`, or None."""
        return self.rope if self.local_rope is None or self.window(layer) is None else self.local_rope
