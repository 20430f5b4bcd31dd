"""Names of a decoder's parameters in GGUF (gguf-py, `constants.py` and `tensor_mapping.py`)."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from mpq.types import MpqError

GGUF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.experts.gate_proj": "ffn_gate_exps",
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
    }
)
"""Part of a decoder's layer -> its GGUF name, `blk.N.` before and `.weight` behind it."""

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ENDS = {
    "embed_tokens.embedding": "token_embd.weight",
    "embed_positions.embedding": "position_embd.weight",
    "lm_head.kernel": "output.weight",
    "norm.scale": "output_norm.weight",
    "norm.bias": "output_norm.bias",
}
ROPE_DIVISORS = "rope_freqs.weight"
"""What rotary frequencies are divided by; of no parameter."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(kernel|scale|bias)")


def gguf_name(path: str, sandwich: bool = False) -> str:
    """Name of the tensor of the parameter at `path`.

    Args:
      path: of the parameter.
      sandwich: whether blocks have norms behind them as well (`DecoderConfig.residual`), and so other names of norms.

    Raises:
      MpqError: none is known.
    """
    match = _LAYER.fullmatch(path)
    parts = {**GGUF_NAMES, **_NORMS, **(_SANDWICH if sandwich else {})}
    if match and match[2] in parts:
        return f"blk.{match[1]}.{parts[match[2]]}.{'bias' if match[3] == 'bias' else 'weight'}"
    if path not in _ENDS:
        raise MpqError(
            f"{path} has no GGUF name that is known here: decoders have layers.N. with {', '.join(GGUF_NAMES)}, and "
            f"{' and '.join(_ENDS)}"
        )
    return _ENDS[path]
