"""Tokenizers, and a tiny random model of every family that has a place in GGUF."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mpq import artifacts
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.gguf.pre_tokenizers import PRE_TOKENIZERS
from mpq.models import FAMILIES, Model, functional
from mpq.models.checkpoint import make_model
from mpq.quantize import RTN, Candidates

SPACE = "\u2581"
VOCAB = 288


def byte_level(pre: str = "gpt-2") -> Tokenizer:
    """Byte-level BPE that cuts text as llama.cpp's `pre`, with a BOS in front of every text, and ids left free."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(("<|bos|>", "<|endoftext|>", *alphabet, "de", "def"))}
    result = Tokenizer(models.BPE(vocab, [("d", "e"), ("de", "f")]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.add_special_tokens(["<|bos|>", "<|endoftext|>"])
    result.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    if pre == "gpt-2":
        return result
    body, way = json.loads(result.to_str()), PRE_TOKENIZERS[pre]
    body |= {"pre_tokenizer": way.pre_tokenizer, "normalizer": way.normalizer}
    body["model"]["ignore_merges"] = way.ignore_merges
    return Tokenizer.from_str(json.dumps(body))


def sentencepiece(
    vocab: tuple[str, ...] = ("ab", "abc"),
    merges: tuple = (("a", "b"), ("ab", "c")),
    *,
    prefix: bool = True,
    bos: bool = False,
) -> Tokenizer:
    """BPE with byte fallback on text whose spaces are U+2581."""
    tokens = ("<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "a", "b", "c", *vocab)
    ids = {token: i for i, token in enumerate(tokens)}
    result = Tokenizer(models.BPE(ids, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    result.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    result.add_special_tokens(["<unk>", "<s>"])
    if bos:
        result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return result


_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GEMMA = _SHAPE | {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32,
                   "sliding_window": 5, "tie_word_embeddings": True}  # fmt: skip
_STRETCHED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip

CONFIGS = {
    "llama": _SHAPE | {"model_type": "llama"},
    "llama 3.1": _SHAPE | {"model_type": "llama", "rope_scaling": _STRETCHED, "tie_word_embeddings": True},
    "llama, linear": _SHAPE | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": _SHAPE | {"model_type": "mistral", "sliding_window": 48},
    "qwen2": _SHAPE | {"model_type": "qwen2"},
    "qwen3": _SHAPE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3": _GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 6, "rope_theta": 1000.0},
    "phi3": _SHAPE | {"model_type": "phi3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 64, "n_embd": 64, "n_inner": 96, "n_layer": 2,
             "n_head": 4, "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 1},
}  # fmt: skip
"""A config of every architecture, and of rotary positions that are stretched."""

_TOKENIZERS = {
    "llama 3.1": lambda: byte_level("llama-bpe"),
    "llama, linear": lambda: byte_level("smollm"),
    "mistral": lambda: sentencepiece(bos=True),
    "qwen2": lambda: byte_level("qwen2"),
    "qwen3": lambda: byte_level("qwen2"),
    "gemma2": lambda: sentencepiece(prefix=False, bos=True),
    "gemma3": lambda: sentencepiece(prefix=False, bos=True),
    "phi3": lambda: sentencepiece(bos=True),
}


def random_model(name: str, config: dict | None = None) -> Model:
    """The model of `CONFIGS[name]` or another config, its parameters random and large enough that all layers matter."""
    config = config or CONFIGS[name]
    family = FAMILIES[config["model_type"]]
    config = config | {"architectures": list(family.architectures)}
    apply, shapes = functional(nnx.eval_shape(lambda: family.build(family.parse(config))))
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in shapes.items():
        noise = rng.standard_normal(shape.shape)
        if path.endswith("norm.scale"):
            value = 0.1 * noise + (config["model_type"][:5] != "gemma")
        else:
            value = noise * (0.1 if path.endswith("bias") else 0.5 if "embed" in path else shape.shape[0] ** -0.5)
        params[path] = jnp.asarray(value, jnp.float32)
    tokenizer = _TOKENIZERS.get(name, byte_level)()
    return make_model(apply, params, dict.fromkeys(params, "float32"), config, family, tokenizer, name)


def quantized(model: Model, schemes: list, folder) -> Exported:
    """The model with its weights at those of the schemes that fit, in turn, through an Orbax folder."""
    weights = model.trace(1, 16).weights
    choice = {}
    for i, w in enumerate(weights):
        fitting = [s for s in schemes if s.fits(w.k)]
        choice[w.path] = fitting[i % len(fitting)]
    plan = artifacts.make_plan("mix", choice, None, weights, 0, model.digest)
    qtensors = Candidates(model.params, weights, RTN()).choose(choice)
    orbax.save(folder, **export_arguments(model, weights, qtensors, plan))
    return orbax.load(folder)
