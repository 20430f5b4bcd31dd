"""Families that llama.cpp computes too: what it calls them, and their shape as metadata and as a `config.json`.

Facts are llama.cpp's (`convert_hf_to_gguf.py`, `src/llama-model.cpp`, gguf-py's `constants.py`, v0.5.0), which also
fixes what its files do not say:

- `llama` (Llama, and Mistral) turns neighbouring features of a head, all others feature `i` with `i + dim / 2`, as the
  checkpoints do. Its `rope_freqs.weight` divides frequencies: how Llama 3.1 stretches them.
- `gemma2` and `gemma3` store the scales of norms as they multiply, the checkpoints less one; the pattern of their
  sliding windows, tied heads and the factor on attention scores are the architecture's own.
- `mistral` and `phi3` slide no window: their files are for contexts within it.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from mpq.gguf.container import Value
from mpq.models.decoders.config import DecoderConfig
from mpq.models.decoders.rope import Linear, Llama3, LongRope, Plain, Rope
from mpq.types import MpqError

_ROPE = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"
_NEUTRAL = (
    "vocab_size",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)
"""Keys that change no forward pass, or repeat what tensors say."""
_ONLY = {"expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "pooling_type": (0,)}
"""Keys with the values that the decoder is right for."""
_LLAMA_LIKE = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GEMMA = {
    **_LLAMA_LIKE,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_OF_DECODER = {"rms_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps", "n_inner": "intermediate_size"}
_OF_DECODER |= {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
_OF_DECODER |= {"n_head": "num_attention_heads", "attn_logit_softcapping": "attention_softcap"}
_OF_DECODER |= {"final_logit_softcapping": "logit_softcap"}
"""Key of a `config.json` -> attribute of a `DecoderConfig`, where they are called otherwise."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
      name: there.
      model_type: of a `config.json`; its family computes the model.
      class_name: the first of `architectures` in it.
      keys: of the metadata, without the architecture's name -> of the `config.json`.
      optional: those keys that a file may leave out, with what they then are.
      implied: of the `config.json`, what the architecture fixes.
      neighbours: rotary positions turn neighbouring features of a head.
      norm_offset: what the stored scales of norms have more than the checkpoint's.
      window_of_context: the context ends at the sliding window, which llama.cpp does not slide.
    """

    name: str
    model_type: str
    class_name: str
    keys: Mapping[str, str]
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neighbours: bool = False
    norm_offset: float = 0.0
    window_of_context: bool = False

    def metadata(self, decoder: DecoderConfig) -> dict[str, Value]:
        """Keys and values of a decoder's shape.

        Raises:
          MpqError: a part of it has no counterpart in llama.cpp.
        """
        self._require(decoder)
        values: dict[str, Value] = {f"{self.name}.vocab_size": decoder.vocab_size}
        for key, name in self.keys.items():
            found = self._value(decoder, name)
            if found is not None:
                values[f"{self.name}.{key}"] = found
        if decoder.rope is not None:
            values |= {f"{self.name}.attention.value_length": decoder.head_dim}
            values |= {f"{self.name}.{key}": value for key, value in _rope_metadata(decoder).items()}
        return values

    def config(self, metadata: Mapping[str, Any], divisors: tuple[float, ...] | None) -> dict[str, Any]:
        """The `config.json` that the keys of a file describe, without its vocabulary and tokens.

        Args:
          metadata: all keys and values of a file of this architecture.
          divisors: of the rotary frequencies, or None.

        Raises:
          MpqError: a key is missing, unknown, or has a value that the family would get wrong.
        """
        prefix = f"{self.name}."
        found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        config: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.class_name]}
        for key, name in self.keys.items():
            if found.get(key) is None and key not in self.optional:
                raise MpqError(f"the file lacks the key {prefix + key!r}, which {self.name} models need")
            config[name] = found.get(key, self.optional.get(key))
            if isinstance(config[name], list):
                raise MpqError(f"key {prefix + key!r} is a list, one for every layer: only equal layers are read")
        known = {*self.keys, *_NEUTRAL, *_ONLY, *_ROPE, "attention.value_length"}
        for key, value in found.items():
            if key not in known or value not in _ONLY.get(key, (value,)):
                raise MpqError(f"key {prefix + key!r} is {value!r}, which is unknown here: it may change the model")
        self._check_head(found, config)
        rope = _rope_config(found, config, divisors) if "rope" not in self.implied else {}
        return config | {k: v for k, v in self.implied.items() if k != "rope"} | rope | self._derived(config)

    def _check_head(self, found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        heads = config.get("num_attention_heads")
        if heads is None:
            return
        size = config["head_dim"] or config["hidden_size"] // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if found.get(key, size) != size:
                raise MpqError(f"key '{self.name}.{key}' is {found[key]}: supported is {size}, the size of a head")

    def _derived(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What Gemma's scores are multiplied by: by the size of a head, in all but the 27B models."""
        if not self.name.startswith("gemma"):
            return {}
        return {"query_pre_attn_scalar": self._score_size(config["num_hidden_layers"], config)}

    def _score_size(self, layers: int, config: Mapping[str, Any]) -> int:
        wide = layers == {"gemma2": 46, "gemma3": 62}[self.name]
        return config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]

    def _value(self, decoder: DecoderConfig, name: str) -> Value | None:
        if name == "sliding_window":
            return next((w for w in decoder.windows if w is not None), None)
        value = getattr(decoder, _OF_DECODER.get(name, name))
        if name in ("max_position_embeddings", "n_positions") and self.window_of_context:
            return min([value, *(w for w in decoder.windows if w is not None)])
        return float(value) if name.endswith(("eps", "epsilon")) else value

    def _require(self, decoder: DecoderConfig) -> None:
        """Refuse what the architecture in llama.cpp computes otherwise."""
        slides = any(w is not None for w in decoder.windows)
        wrong = {
            "an activation other than its own": decoder.activation != _ACTIVATIONS[self.name],
            "a sliding window": slides and not self.window_of_context and "sliding_window" not in self.keys.values(),
            "experts": decoder.experts is not None,
            "other biases": (decoder.qkv_bias, decoder.o_bias, decoder.mlp_bias) != _BIASES.get(self.name, _NO_BIASES),
        }
        if self.name.startswith("gemma"):
            config = {name: getattr(decoder, name) for name in ("hidden_size", "num_attention_heads", "head_dim")}
            scale = self._score_size(decoder.num_hidden_layers, config) ** -0.5
            wrong["another factor on attention scores"] = decoder.attention_scale != scale
            wrong["a head of its own"] = not decoder.tie_word_embeddings
            every = 2 if self.name == "gemma2" else 6
            pattern = tuple((i + 1) % every != 0 for i in range(decoder.num_hidden_layers))
            wrong["another pattern of windows"] = tuple(w is not None for w in decoder.windows) != pattern
        if self.name == "gemma3":
            wrong["soft caps"] = decoder.logit_softcap is not None
            wrong["other local rotary positions"] = decoder.local_rope != Rope(10_000.0)
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise MpqError(
                    f"the model has {what}, with which llama.cpp's {self.name} would compute another one: it has no "
                    "place in GGUF"
                )


def _rope_metadata(decoder: DecoderConfig) -> dict[str, Value]:
    """Rotary positions of a decoder that has them."""
    rope = decoder.rope
    assert rope is not None
    if rope.fraction != 1 or not isinstance(rope.scaling, Plain | Linear | Llama3 | LongRope):
        raise MpqError("partial, dynamic or yarn rotary positions have no mapping to GGUF yet: export a model without")
    values: dict[str, Value] = {"rope.dimension_count": decoder.head_dim, "rope.freq_base": float(rope.theta)}
    if isinstance(rope.scaling, Linear):
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.scaling.factor)}
    return values


def rope_divisors(decoder: DecoderConfig) -> tuple[float, ...] | None:
    """What llama.cpp is to divide each rotary frequency by, `head_dim / 2` numbers; None: by nothing.

    Raises:
      MpqError: the scaling also changes magnitudes, or depends on the window's length.
    """
    scaling = None if decoder.rope is None else decoder.rope.scaling
    if scaling is None or isinstance(scaling, Plain | Linear):
        return None
    assert decoder.rope is not None
    if isinstance(scaling, LongRope) and (scaling.short_factor != scaling.long_factor or scaling.magnitude != 1):
        raise MpqError(
            "rotary positions that change with the window's length have no mapping to GGUF yet: export a model without"
        )
    theta, dim = decoder.rope.theta, decoder.head_dim
    plain = Plain().frequencies(theta, dim, decoder.max_position_embeddings)
    return tuple((plain / scaling.frequencies(theta, dim, decoder.max_position_embeddings)).tolist())


def _rope_config(
    found: Mapping[str, Any], config: Mapping[str, Any], divisors: tuple[float, ...] | None
) -> dict[str, Any]:
    base = {"rope_theta": float(found.get("rope.freq_base", 10_000.0))}
    if "rope.freq_base_swa" in found:
        base["rope_local_base_freq"] = float(found["rope.freq_base_swa"])
    kind = found.get("rope.scaling.type", "linear" if found.get("rope.scaling.factor", 0.0) else "none")
    factor = float(found.get("rope.scaling.factor") or 1.0)
    if kind not in ("none", "linear"):
        raise MpqError(f"rotary positions are scaled by {kind!r}: read are none, linear, and tensors of divisors")
    if divisors is not None:
        scaling = {"rope_type": "longrope", "short_factor": list(divisors), "long_factor": list(divisors)}
        context = {"original_max_position_embeddings": config["max_position_embeddings"]}
        return base | {"rope_scaling": scaling | context | {"factor": 1.0, "attention_factor": 1.0}}
    return base if kind == "none" or factor == 1 else base | {"rope_scaling": {"rope_type": "linear", "factor": factor}}


_NO_KEY = {"attention.key_length": None, "attention.head_count_kv": None}
_LLAMA = Architecture(
    "llama", "llama", "LlamaForCausalLM", _LLAMA_LIKE, _NO_KEY, MappingProxyType({"hidden_act": "silu"}), True
)
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": dataclasses.replace(
            _LLAMA, model_type="mistral", class_name="MistralForCausalLM", window_of_context=True
        ),
        "qwen2": Architecture(
            "qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA_LIKE, _NO_KEY, MappingProxyType({"hidden_act": "silu"})
        ),
        "qwen3": Architecture(
            "qwen3", "qwen3", "Qwen3ForCausalLM", _LLAMA_LIKE, _NO_KEY, MappingProxyType({"hidden_act": "silu"})
        ),
        "gemma2": Architecture(
            "gemma2",
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA,
            MappingProxyType(
                {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}
            ),
            MappingProxyType({"hidden_activation": "gelu_pytorch_tanh"}),
            norm_offset=1.0,
        ),
        "gemma3_text": Architecture(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            {k: v for k, v in _GEMMA.items() if "softcapping" not in k},
            implied=MappingProxyType({"hidden_activation": "gelu_pytorch_tanh"}),
            norm_offset=1.0,
        ),
        "phi3": Architecture(
            "phi3",
            "phi3",
            "Phi3ForCausalLM",
            _LLAMA_LIKE,
            _NO_KEY,
            MappingProxyType({"hidden_act": "silu"}),
            window_of_context=True,
        ),
        "gpt2": Architecture(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2_KEYS,
            implied=MappingProxyType({"activation_function": "gelu_new", "rope": None}),
        ),
    }
)
"""`model_type` of a `config.json` -> architecture. Two may share one of llama.cpp's; a file is read as the first."""

_NO_BIASES = (False, False, False)
_BIASES = {"qwen2": (True, False, False), "gpt2": (True, True, True)}
"""Of queries, keys and values; of the output projection; of the feed-forward block."""
_ACTIVATIONS: dict[str, str] = dict.fromkeys(("llama", "qwen2", "qwen3", "phi3"), "silu")
_ACTIVATIONS |= {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh", "gpt2": "gelu_new"}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model's config.

    Raises:
      MpqError: llama.cpp has none that is known here.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise MpqError(f"models of type {kind!r} have no mapping to GGUF yet: it takes {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def architecture_named(name: str) -> Architecture:
    """The architecture that llama.cpp calls `name`.

    Raises:
      MpqError: it is not known here.
    """
    for found in ARCHITECTURES.values():
        if found.name == name:
            return found
    names = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES.values()))
    raise MpqError(f"GGUF files of architecture {name!r} are not read yet: those read are {names}")


def head_order(path: str, decoder: DecoderConfig, architecture: Architecture) -> np.ndarray | None:
    """Which row of the checkpoint each row of the file is, of queries and keys; None: they are in the same order."""
    heads = {"q_proj": decoder.num_attention_heads, "k_proj": decoder.num_key_value_heads}
    part = path.split(".")[-2] if "." in path else ""
    return interleaved(heads[part], decoder.head_dim) if architecture.neighbours and part in heads else None


def interleaved(heads: int, head_dim: int) -> np.ndarray:
    """`int64[heads * head_dim]`: which row of the checkpoint each row of the file is."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
