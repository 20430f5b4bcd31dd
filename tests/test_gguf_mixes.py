"""llama.cpp's mixes of types, against what its own quantizer chose."""

import dataclasses

import pytest

from mpq.gguf.export import decoder_of
from mpq.gguf.mixes import MIXES, mix
from mpq.gguf.names import gguf_name
from mpq.models import FAMILIES
from mpq.types import MpqError
from tests.gguf_cases import CONFIGS, random_model

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1}
SHAPES = {
    "llama": WIDE | {"num_hidden_layers": 17},
    "qwen2": WIDE | {"num_hidden_layers": 9, "num_key_value_heads": 2, "intermediate_size": 288},
    "gemma2": WIDE | {"num_hidden_layers": 4, "query_pre_attn_scalar": 32},
    "gpt2": {"n_layer": 9, "n_embd": 256, "n_inner": 512},
    "phi3": {"num_hidden_layers": 3},
}
"""What differs from `CONFIGS`."""

KINDS = {
    "2": "q2_k",
    "3": "q3_k",
    "4": "q4_k",
    "5": "q5_k",
    "6": "q6_k",
    "8": "q8_0",
    "a": "q4_0",
    "b": "q5_0",
    "c": "q5_1",
}

# Types in the files that `llama_model_quantize` of llama.cpp v0.5.0 made of models of these shapes, layer by layer; one
# letter stands for all layers. Made with the libllama of the npm package @node-llama-cpp/linux-x64 3.22.1.
LLAMA_CPP = {
    "llama": {
        "Q2_K": "attn_k:2 attn_output:3 attn_q:2 attn_v:4 ffn_down:3 ffn_gate:2 ffn_up:2 output:6 token_embd:2",
        "Q3_K_M": "attn_k:3 attn_output:4 attn_q:3 attn_v:55444444444444444 "
        "ffn_down:54444444444444444 ffn_gate:3 ffn_up:3 output:6 token_embd:3",
        "Q4_K_M": "attn_k:4 attn_output:4 attn_q:4 attn_v:66446446446446666 "
        "ffn_down:66446446446446666 ffn_gate:4 ffn_up:4 output:6 token_embd:4",
        "Q5_K_M": "attn_k:5 attn_output:5 attn_q:5 attn_v:66556556556556666 "
        "ffn_down:66556556556556666 ffn_gate:5 ffn_up:5 output:6 token_embd:5",
        "Q6_K": "attn_k:6 attn_output:6 attn_q:6 attn_v:6 ffn_down:6 ffn_gate:6 ffn_up:6 output:6 token_embd:6",
    },
    "qwen2": {
        "Q2_K": "attn_k:2 attn_output:3 attn_q:2 attn_v:3 ffn_down:a ffn_gate:2 ffn_up:2 output:6 token_embd:2",
        "Q3_K_M": "attn_k:3 attn_output:4 attn_q:3 attn_v:554444444 "
        "ffn_down:b ffn_gate:3 ffn_up:3 output:6 token_embd:3",
        "Q4_K_M": "attn_k:4 attn_output:4 attn_q:4 attn_v:644644666 "
        "ffn_down:8bb8bb888 ffn_gate:4 ffn_up:4 output:6 token_embd:4",
        "Q5_K_M": "attn_k:5 attn_output:5 attn_q:5 attn_v:655655666 "
        "ffn_down:8cc8cc888 ffn_gate:5 ffn_up:5 output:6 token_embd:5",
        "Q6_K": "attn_k:6 attn_output:6 attn_q:6 attn_v:6 ffn_down:8 ffn_gate:6 ffn_up:6 output:6 token_embd:6",
    },
    "gemma2": {
        "Q2_K": "attn_k:2 attn_output:a attn_q:2 attn_v:4 ffn_down:3 ffn_gate:2 ffn_up:2 token_embd:6",
        "Q3_K_M": "attn_k:3 attn_output:b attn_q:3 attn_v:5544 ffn_down:4 ffn_gate:3 ffn_up:3 token_embd:6",
        "Q4_K_M": "attn_k:4 attn_output:b attn_q:4 attn_v:4466 ffn_down:4466 ffn_gate:4 ffn_up:4 token_embd:6",
        "Q5_K_M": "attn_k:5 attn_output:c attn_q:5 attn_v:5566 ffn_down:5566 ffn_gate:5 ffn_up:5 token_embd:6",
        "Q6_K": "attn_k:6 attn_output:8 attn_q:6 attn_v:6 ffn_down:6 ffn_gate:6 ffn_up:6 token_embd:6",
    },
    "gpt2": {
        "Q2_K": "attn_output:3 attn_qkv:3 ffn_down:3 ffn_up:2 token_embd:6",
        "Q3_K_M": "attn_output:4 attn_qkv:554444444 ffn_down:4 ffn_up:3 token_embd:6",
        "Q4_K_M": "attn_output:4 attn_qkv:644644666 ffn_down:644644666 ffn_up:4 token_embd:6",
        "Q5_K_M": "attn_output:5 attn_qkv:655655666 ffn_down:655655666 ffn_up:5 token_embd:6",
        "Q6_K": "attn_output:6 attn_qkv:6 ffn_down:6 ffn_up:6 token_embd:6",
    },
    "phi3": {
        "Q2_K": "attn_output:a attn_qkv:a ffn_down:a ffn_up:a output:8 token_embd:a",
        "Q3_K_M": "attn_output:b attn_qkv:ccb ffn_down:b ffn_up:a output:8 token_embd:a",
        "Q4_K_M": "attn_output:b attn_qkv:bb8 ffn_down:bb8 ffn_up:b output:8 token_embd:b",
        "Q5_K_M": "attn_output:c attn_qkv:cc8 ffn_down:cc8 ffn_up:c output:8 token_embd:c",
        "Q6_K": "attn_output:8 attn_qkv:8 ffn_down:8 ffn_up:8 output:8 token_embd:8",
    },
}


def weights_of(name: str, **more):
    """Traced weights, decoder and `model_type` of a shape."""
    config = CONFIGS[name] | SHAPES[name] | more
    config |= {"architectures": list(FAMILIES[config["model_type"]].architectures)}
    model = random_model(name, config)
    return model.trace(1, 8).weights, decoder_of(config), config["model_type"]


@pytest.mark.parametrize("name", SHAPES)
def test_types_are_those_of_llama_cpp(name):
    weights, decoder, kind = weights_of(name)
    for mix_name in MIXES:
        chosen = {
            gguf_name(path, decoder.residual == "sandwich"): str(s)
            for path, s in mix(mix_name, weights, decoder, kind).items()
        }
        expected = {}
        for entry in LLAMA_CPP[name][mix_name].split():
            part, _, letters = entry.partition(":")
            if part in ("output", "token_embd"):
                expected[f"{part}.weight"] = KINDS[letters]
                continue
            letters = letters * decoder.num_hidden_layers if len(letters) == 1 else letters
            expected |= {f"blk.{i}.{part}.weight": KINDS[letter] for i, letter in enumerate(letters)}
        assert chosen == expected


def test_a_70b_llama_has_more_for_values_and_rows_that_fill_nothing_are_f16():
    weights, decoder, _ = weights_of("llama")
    large = dataclasses.replace(decoder, num_hidden_layers=80)
    values = {p: str(s) for p, s in mix("q3_k_m", weights, large, "llama").items() if "v_proj" in p}
    assert set(values.values()) == {"q5_k"}
    odd = tuple(dataclasses.replace(w, k=40) for w in weights)
    assert {str(s) for s in mix("Q2_K", odd, decoder, "llama").values()} == {"fp16"}


def test_another_mix_is_refused():
    with pytest.raises(MpqError) as raised:
        mix("Q1_K", (), None, "llama")
    assert str(raised.value) == (
        "mix 'Q1_K' is none of llama.cpp's that are known here: Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, Q6_K"
    )
