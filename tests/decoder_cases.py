"""One tiny checkpoint a decoder family: its config, the shapes of its tensors, the weights that a trace must find."""

import dataclasses

from mpq.models import FAMILIES
from tests import checkpoint_folders as folders

D, F, VOCAB, CONTEXT, LAYERS, EXPERTS = 16, 24, 40, 16, 2, 3

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "bos_token_id": 3,
}
NO_GROUPS = {
    key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")
}
GEMMA = SHAPE | {"head_dim": 6, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 5,
                 "sliding_window": 3, "tie_word_embeddings": True}  # fmt: skip
QWEN_MOE = {"moe_intermediate_size": 10, "num_experts": EXPERTS, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`config` and `shapes` of a checkpoint; `weights`: path in a block -> (batch, k, n, fused group or "")."""

    config: dict
    shapes: dict
    weights: dict
    ends: tuple = ("embed_tokens.embedding", "lm_head.kernel")
    unquantized: tuple = ()


def matrices(table, at="", norms=(), bias=()):
    """`name -> (n, k)` and norms, as tensor shapes under `at`."""
    found = {f"{at}{name}.weight": shape for name, shape in table.items()}
    found |= {f"{at}{name}.weight": (size,) for name, size in norms}
    return found | {f"{at}{name}.bias": (table.get(name, (D,))[0],) for name in bias}


def model(block, norms=(("input_layernorm", D), ("post_attention_layernorm", D)), bias=(), *, tied=False):
    """The tensors of a checkpoint that is named like Llama's."""
    found = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        found |= matrices(block, f"model.layers.{i}.", norms, bias)
    return found | ({} if tied else {"lm_head.weight": (VOCAB, D)})


def blocks(names, at, **top):
    """Tensors of the other families: `names` of a block -> shape, in every block, and the shapes at the top."""
    inside = {f"{at}.{i}.{name}": shape for i in range(LAYERS) for name, shape in names.items()}
    return inside | {name.replace("__", "."): shape for name, shape in top.items()}


def with_bias(table):
    """`name -> shape of the weight`, and the bias beside it."""
    both = {f"{name}.weight": shape for name, shape in table.items()}
    return both | {f"{name}.bias": (shape[0],) for name, shape in table.items()}


def attention(q=D, kv=8):
    return {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, q)}  # fmt: skip


def attention_weights(q=D, kv=8, group="self_attn.{q,k,v}_proj.kernel"):
    sizes = {"q": q, "k": kv, "v": kv}
    found = {f"self_attn.{name}_proj.kernel": (1, D, n, group) for name, n in sizes.items()}
    return found | {"self_attn.o_proj.kernel": (1, q, D, "")}


GLU = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
GLU_WEIGHTS = {
    "mlp.gate_proj.kernel": (1, D, F, "mlp.{gate,up}_proj.kernel"),
    "mlp.up_proj.kernel": (1, D, F, "mlp.{gate,up}_proj.kernel"),
    "mlp.down_proj.kernel": (1, F, D, ""),
}
PLAIN_WEIGHTS = {"mlp.up_proj.kernel": (1, D, F, ""), "mlp.down_proj.kernel": (1, F, D, "")}
FUSED_WEIGHTS = {"self_attn.qkv_proj.kernel": (1, D, 3 * D, ""), "self_attn.o_proj.kernel": (1, D, D, "")}
QK_NORMS = (("input_layernorm", D), ("post_attention_layernorm", D), ("self_attn.q_norm", 6), ("self_attn.k_norm", 6))
GEMMA_NORMS = tuple(
    (name, D)
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
)
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
EXPERT_WEIGHTS = {
    "mlp.experts.gate_proj.kernel": (EXPERTS, D, 10, "mlp.experts.{gate,up}_proj.kernel"),
    "mlp.experts.up_proj.kernel": (EXPERTS, D, 10, "mlp.experts.{gate,up}_proj.kernel"),
    "mlp.experts.down_proj.kernel": (EXPERTS, 10, D, ""),
}
TIED = ("embed_tokens.embedding",)


def experts(at, gate, up, down, size=10):
    table = {f"{at}.gate": (EXPERTS, D)}
    for e in range(EXPERTS):
        table |= {f"{at}.experts.{e}.{gate}": (size, D), f"{at}.experts.{e}.{up}": (size, D)}
        table |= {f"{at}.experts.{e}.{down}": (D, size)}
    return table


SHARED = {"mlp.shared_expert.gate_proj": (14, D), "mlp.shared_expert.up_proj": (14, D),
          "mlp.shared_expert.down_proj": (D, 14), "mlp.shared_expert_gate": (1, D)}  # fmt: skip
WITH_ROUTER = ",".join(
    f"layers.I.mlp.{name}.kernel"
    for name in ("router", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj")
)
GPT2 = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": D, "n_inner": F, "n_layer": LAYERS, "n_head": 4,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-3, "bos_token_id": 3}  # fmt: skip
OPT = {"vocab_size": VOCAB, "hidden_size": D, "ffn_dim": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
       "max_position_embeddings": CONTEXT, "activation_function": "relu", "bos_token_id": 3}  # fmt: skip
OPT_BLOCK = {
    "self_attn_layer_norm.weight": (D,), "self_attn_layer_norm.bias": (D,), "final_layer_norm.weight": (D,),
    "final_layer_norm.bias": (D,),
} | with_bias(
    {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D), "self_attn.out_proj": (D, D),
     "fc1": (F, D), "fc2": (D, F)}
)  # fmt: skip
OPT_TOP = {"model__decoder__embed_positions__weight": (CONTEXT + 2, D)}

CASES = {
    "llama": Case(SHAPE, model(attention() | GLU), attention_weights() | GLU_WEIGHTS),
    "mistral": Case(SHAPE | {"sliding_window": 3}, model(attention() | GLU), attention_weights() | GLU_WEIGHTS),
    "qwen2": Case(
        SHAPE | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "tie_word_embeddings": True},
        model(attention() | GLU, bias=QKV, tied=True),
        attention_weights() | GLU_WEIGHTS,
        TIED,
    ),
    "qwen3": Case(
        SHAPE | {"head_dim": 6},
        model(attention(24, 12) | GLU, QK_NORMS),
        attention_weights(24, 12) | GLU_WEIGHTS,
    ),
    "gemma2": Case(
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        model(attention(24, 12) | GLU, GEMMA_NORMS, tied=True),
        attention_weights(24, 12) | GLU_WEIGHTS,
        TIED,
    ),
    "gemma3_text": Case(
        GEMMA | {"sliding_window_pattern": 2, "rope_local_base_freq": 7.0},
        model(attention(24, 12) | GLU, (*GEMMA_NORMS, *QK_NORMS[2:]), tied=True),
        attention_weights(24, 12) | GLU_WEIGHTS,
        TIED,
    ),
    "phi3": Case(
        SHAPE | {"sliding_window": 3},
        model({"self_attn.qkv_proj": (D + 2 * 8, D), "self_attn.o_proj": (D, D), "mlp.gate_up_proj": (2 * F, D),
               "mlp.down_proj": (D, F)}),
        {"self_attn.qkv_proj.kernel": (1, D, D + 2 * 8, ""), "self_attn.o_proj.kernel": (1, D, D, ""),
         "mlp.gate_up_proj.kernel": (1, D, 2 * F, ""), "mlp.down_proj.kernel": (1, F, D, "")},
    ),
    "gpt2": Case(
        GPT2,
        blocks(
            {f"{name}.weight": shape for name, shape in
             {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D),
              "ln_1": (D,), "ln_2": (D,)}.items()}
            | {"attn.c_attn.bias": (3 * D,), "attn.c_proj.bias": (D,), "mlp.c_fc.bias": (F,), "mlp.c_proj.bias": (D,),
               "ln_1.bias": (D,), "ln_2.bias": (D,)},
            "transformer.h",
            transformer__wte__weight=(VOCAB, D), transformer__wpe__weight=(CONTEXT, D),
            transformer__ln_f__weight=(D,), transformer__ln_f__bias=(D,),
        ),
        FUSED_WEIGHTS | PLAIN_WEIGHTS,
        TIED,
        ("embed_positions.embedding",),
    ),
    "opt": Case(
        OPT | {"do_layer_norm_before": True},
        blocks(OPT_BLOCK, "model.decoder.layers", model__decoder__embed_tokens__weight=(VOCAB, D),
               model__decoder__final_layer_norm__weight=(D,), model__decoder__final_layer_norm__bias=(D,), **OPT_TOP),
        attention_weights(D, D) | PLAIN_WEIGHTS,
        TIED,
        ("embed_positions.embedding",),
    ),
    "opt, post-norm, projected": Case(
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 10},
        blocks(OPT_BLOCK, "model.decoder.layers", model__decoder__embed_tokens__weight=(VOCAB, 10),
               model__decoder__project_in__weight=(D, 10), model__decoder__project_out__weight=(10, D), **OPT_TOP),
        attention_weights(D, D) | PLAIN_WEIGHTS,
        (*TIED, "project_in.kernel", "project_out.kernel"),
        ("embed_positions.embedding",),
    ),
    "gpt_neox": Case(
        NO_GROUPS | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "rotary_pct": 0.5, "rotary_emb_base": 100,
                     "use_parallel_residual": True},
        blocks(
            with_bias({"attention.query_key_value": (3 * D, D), "attention.dense": (D, D), "mlp.dense_h_to_4h": (F, D),
                       "mlp.dense_4h_to_h": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}),
            "gpt_neox.layers", gpt_neox__embed_in__weight=(VOCAB, D), embed_out__weight=(VOCAB, D),
            gpt_neox__final_layer_norm__weight=(D,), gpt_neox__final_layer_norm__bias=(D,),
        ),
        FUSED_WEIGHTS | PLAIN_WEIGHTS,
    ),
    "mixtral": Case(
        SHAPE | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 10},
        model(attention() | experts("block_sparse_moe", "w1", "w3", "w2")),
        attention_weights() | EXPERT_WEIGHTS | {"mlp.router.kernel": (1, D, EXPERTS, "")},
    ),
    "qwen2_moe": Case(
        SHAPE | QWEN_MOE | {"shared_expert_intermediate_size": 14},
        model(attention() | experts("mlp", "gate_proj", "up_proj", "down_proj") | SHARED, bias=QKV),
        attention_weights() | EXPERT_WEIGHTS | {
            "mlp.router.kernel": (1, D, EXPERTS, WITH_ROUTER),
            "mlp.shared_expert_gate.kernel": (1, D, 1, WITH_ROUTER),
            "mlp.shared_expert.gate_proj.kernel": (1, D, 14, WITH_ROUTER),
            "mlp.shared_expert.up_proj.kernel": (1, D, 14, WITH_ROUTER),
            "mlp.shared_expert.down_proj.kernel": (1, 14, D, ""),
        },
    ),
    "qwen3_moe": Case(
        SHAPE | QWEN_MOE | {"head_dim": 6, "norm_topk_prob": True},
        model(attention(24, 12) | experts("mlp", "gate_proj", "up_proj", "down_proj"), QK_NORMS),
        attention_weights(24, 12) | EXPERT_WEIGHTS | {"mlp.router.kernel": (1, D, EXPERTS, "")},
    ),
}  # fmt: skip


def config_of(name):
    kind = name.split(",")[0]
    (architecture,) = FAMILIES[kind].architectures
    return {"architectures": [architecture], "model_type": kind, **CASES[name].config}


def write(path, name, config=None, tensors=None):
    return folders.write(path, config or config_of(name), tensors or folders.random_tensors(CASES[name].shapes))
