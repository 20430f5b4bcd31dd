"""Names of a Llama-like decoder's parameters in GGUF (gguf-py, `tensor_mapping.py`)."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from mpq.types import MpqError

GGUF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.experts.gate_proj": "ffn_gate_exps",
        "mlp.experts.up_proj": "ffn_up_exps",
        "mlp.experts.down_proj": "ffn_down_exps",
    }
)
"""Part of a decoder's layer -> its GGUF name, `blk.N.` before and `.weight` behind it."""

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_ENDS = {"embed_tokens.embedding": "token_embd.weight", "lm_head.kernel": "output.weight"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(kernel|scale)")


def gguf_name(path: str) -> str:
    """Name of the tensor of the parameter at `path`.

    Raises:
      MpqError: none is known.
    """
    match = _LAYER.fullmatch(path)
    name = (GGUF_NAMES if match[3] == "kernel" else _NORMS).get(match[2]) if match else None
    if match and name:
        return f"blk.{match[1]}.{name}.weight"
    if path == "norm.scale":
        return "output_norm.weight"
    if path not in _ENDS:
        raise MpqError(
            f"{path} has no GGUF name that is known here: Llama-like decoders have layers.N. with "
            f"{', '.join(GGUF_NAMES)}, and {' and '.join(_ENDS)}"
        )
    return _ENDS[path]
