"""Every decoder family against `transformers`: logits and greedy text of random models, and what configs mean.

Both sides compute in float32 from the same weights; the bound on the logits is 1e-4. Sequences are longer than the
sliding windows, so that these matter, and norms and biases are random, so that none can be missing or swapped.
"""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from mpq.models import FAMILIES, load
from tests.decoder_configs import PUBLISHED

pytestmark = pytest.mark.parity

LOGITS_ATOL = 1e-4
VOCAB, TIME, PROMPT, GENERATED = 96, 48, 8, 32
OFFSET_NORMS = ("gemma2", "gemma3_text")  # they store scale - 1

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": 6, "num_hidden_layers": 3}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 64, "init_std": 0.3}  # fmt: skip
NEOX = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}


def scaled(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 2.0, 3.0, 7.0]}

CASES = {
    "llama, biases": ("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama, rope linear": ("Llama", SHAPE | scaled("linear", factor=3.0)),
    "llama, rope dynamic": ("Llama", SHAPE | scaled("dynamic", factor=3.0)),
    "llama, rope dynamic, beyond its context": (
        "Llama",
        SHAPE | {"max_position_embeddings": 32} | scaled("dynamic", factor=3.0),
    ),
    "llama, rope llama3": ("Llama", SHAPE | scaled("llama3", **LLAMA3)),
    "llama, rope yarn": ("Llama", SHAPE | {"head_dim": 16} | scaled("yarn", **YARN)),
    "llama, rope yarn, all options": (
        "Llama",
        SHAPE
        | {"head_dim": 16}
        | scaled("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, mscale=2.0, mscale_all_dim=0.5, truncate=False),
    ),
    "llama, rope yarn, attention factor": ("Llama", SHAPE | scaled("yarn", **YARN, attention_factor=1.5)),
    "llama, exact gelu": ("Llama", SHAPE | {"hidden_act": "gelu"}),
    "mistral": ("Mistral", SHAPE | {"sliding_window": 6}),
    "mistral, no window": ("Mistral", SHAPE | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen2, window from layer 1": (
        "Qwen2",
        SHAPE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, biases, window in layer 0": (
        "Qwen3",
        SHAPE
        | {
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": ("Gemma2", SHAPE | GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2, no caps, biases": (
        "Gemma2",
        SHAPE | GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3": ("Gemma3", SHAPE | GEMMA | {"sliding_window_pattern": 2, "final_logit_softcapping": 5.0}),
    "gemma3, rope linear": (
        "Gemma3",
        SHAPE
        | GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", SHAPE | {"sliding_window": 6}),
    "phi3, part of a head": ("Phi3", SHAPE | {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "phi3, longrope": ("Phi3", SHAPE | {"original_max_position_embeddings": 32} | scaled("longrope", **LONG)),
    "phi3, longrope, not reached": (
        "Phi3",
        SHAPE | {"original_max_position_embeddings": 56} | scaled("longrope", **LONG),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied, narrow": (
        "GPT2",
        GPT2 | {"n_inner": 24, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "opt": ("OPT", OPT),
    "opt, post-norm, projected": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt, no biases": ("OPT", OPT | {"enable_bias": False, "activation_function": "gelu"}),
    "gpt-neox": ("GPTNeoX", NEOX),
    "gpt-neox, serial, half of a head": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
        | scaled("default", partial_rotary_factor=0.5),
    ),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 5, "sliding_window": 6}),
    "qwen2-moe": ("Qwen2Moe", SHAPE | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen2-moe, one dense layer, normalized": (
        "Qwen2Moe",
        SHAPE
        | EXPERTS
        | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3-moe": ("Qwen3Moe", SHAPE | EXPERTS | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3-moe, every second layer, windows": (
        "Qwen3Moe",
        SHAPE | EXPERTS | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
}  # fmt: skip
HEADS = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


@pytest.fixture(params=CASES.values(), ids=CASES.keys(), scope="module")
def folder(request, tmp_path_factory):
    """A random model of `transformers`, saved by it."""
    family, options = request.param
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(
        # far from the usual 0.02, with which random logits are so flat that a wrong model would pass
        **{"initializer_range": 0.3, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1} | options
    )
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # ones and zeros hide what is missing or swapped
                centre = 1.0 if name.endswith("weight") and config.model_type not in OFFSET_NORMS else 0.0
                parameter.normal_(centre, 0.3)
            elif "gate.weight" in name or "experts" in name:  # some begin as zeros, or as whatever lay in memory
                parameter.normal_(0.0, 0.3)
    path = tmp_path_factory.mktemp("random")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pair(folder):
    """Our model and theirs."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load(str(folder)), theirs.eval()


def test_logits_are_the_same(pair):
    model, theirs = pair
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TIME), np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert want.std() > 0.5  # not flat
    np.testing.assert_allclose(model.apply(model.params, tokens), want, atol=LOGITS_ATOL, rtol=0)


def test_greedy_text_is_the_same(pair):
    """Token by token; they keep a cache of keys and values, we recompute."""
    model, theirs = pair
    prompt = np.random.default_rng(1).integers(2, VOCAB, PROMPT)
    with torch.no_grad():
        ids = torch.from_numpy(prompt[None])
        want = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GENERATED - PROMPT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
    tokens, apply = np.zeros((1, GENERATED), np.int32), jax.jit(model.apply)
    tokens[0, :PROMPT] = prompt
    for position in range(PROMPT, GENERATED):
        tokens[0, position] = np.argmax(apply(model.params, tokens)[0, position - 1])
    assert tokens[0].tolist() == want.tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_it_means_to_transformers(name, tmp_path):
    """They fill in every default and write it their way; we read both."""
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    filled = transformers.AutoConfig.from_pretrained(tmp_path)
    filled.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written != published
    parse = FAMILIES[published["model_type"]].parse
    assert parse(written) == parse(published)
