"""Rules for other tools: expanded as the tool expands them, they give the plan back."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from mpq.export import rules
from mpq.formats import parse_scheme
from mpq.types import MpqError
from tests.allocate_cases import weight

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA = [weight("embed_tokens.embedding"), weight("lm_head.kernel")]
LLAMA += [weight(f"layers.{layer}.{part}.kernel") for layer in range(12) for part in PARTS]


def plan(texts, seed=0, weights=LLAMA):
    """Neighbours are often equal, as in a real plan."""
    rng = np.random.default_rng(seed)
    favourite = dict.fromkeys(spec.path.rpartition("layers")[2][2:] for spec in weights)
    favourite = {part: texts[rng.integers(len(texts))] for part in favourite}
    other = lambda path: favourite[path.rpartition("layers")[2][2:]] if rng.random() < 0.7 else rng.choice(texts)
    return {spec.path: parse_scheme(str(other(spec.path))) for spec in weights}


def gguf(path):
    """By hand, in the words of gguf-py's tensor_mapping.py."""
    words = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    words |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts = path.split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{words[parts[3]]}.weight"
    return {"embed_tokens": "token_embd.weight", "lm_head": "output.weight"}[parts[0]]


@pytest.mark.parametrize("seed", range(5))
def test_llama_cpp_gives_the_plan_back(seed):
    fitting = [text for text in rules.GGML_TYPES if all(parse_scheme(text).fits(spec.k) for spec in LLAMA)]
    assert "q4_0" in fitting  # rows of 64 fill blocks of 32, not of 256
    choices = plan(tuple(fitting), seed)
    lines = rules.llama_cpp(choices, LLAMA).split()
    for spec in LLAMA:
        # lower case and std::regex_search, as llama-quantize does; first match and last match must agree
        kinds = [line.split("=") for line in lines]
        found = [kind for pattern, kind in kinds if re.search(pattern.lower(), gguf(spec.path))]
        assert found == [rules.GGML_TYPES[str(choices[spec.path])]], spec.path
    assert len(lines) < len(LLAMA)


@pytest.mark.parametrize("seed", range(5))
def test_qwix_gives_the_plan_back(seed):
    texts = ("int2_g64", "int3_channel", "int4_g32", "int4_g32_zp", "int8_channel", "nf4_g64", "bf16")
    texts += ("fp4_g64", "fp8_e4m3_channel", "fp8_e5m2_g64")
    dtypes = {"fp4": "float4_e2m1fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "bf16": None}
    choices = plan(texts, seed)
    written = json.loads(json.dumps(rules.qwix(choices, LLAMA)))
    for spec in LLAMA:
        module, scheme = "/".join(spec.path.split(".")[:-1]), choices[spec.path]
        (rule,) = [rule for rule in written if re.fullmatch(rule["module_path"], module)]
        assert rule["weight_qtype"] == dtypes.get(scheme.format.name, str(scheme).split("_")[0])
        assert rule.get("tile_size") == scheme.group_size
        assert rule.get("weight_calibration_method", "absmax") == ("minmax" if scheme.zero_point else "absmax")
    assert len(written) < len(LLAMA)


@pytest.mark.parametrize("seed", range(5))
def test_compressed_tensors_gives_the_plan_back(seed):
    choices = plan(("int2_g64", "int4_g32", "int4_g32_zp", "int8_channel", "int8_tensor", "bf16", "fp32"), seed)
    written = json.loads(json.dumps(rules.compressed_tensors(choices, LLAMA)))
    targets = [(t, group["weights"]) for group in written["config_groups"].values() for t in group["targets"]]
    targets += [(target, None) for target in written["ignore"]]
    for spec in LLAMA:
        module = spec.path.rpartition(".")[0]
        name, scheme = module if module == "lm_head" else f"model.{module}", choices[spec.path]
        (found,) = [value for target, value in targets if re.match(target.removeprefix("re:"), name)]
        if scheme.format.name in ("bf16", "fp32"):
            assert found is None
            continue
        assert (found["num_bits"], found["type"]) == (scheme.format.bits, "int")
        assert found["symmetric"] is not scheme.zero_point
        whole = "tensor" if scheme.per_tensor else "channel"
        assert found["strategy"] == (whole if scheme.group_size is None else "group")
        assert found.get("group_size") == scheme.group_size
    assert len(targets) < len(LLAMA)
    assert len(written["config_groups"]) == len({str(s) for s in choices.values() if s.has_scale})


def test_a_uniform_plan_is_folded_to_the_fewest_patterns():
    choices = {spec.path: parse_scheme("int4_g32") for spec in LLAMA}
    layers = "|".join(map(str, range(12)))
    assert rules.llama_cpp(choices, LLAMA).splitlines() == [
        r"^(token_embd|output)\.weight$=q4_0",
        rf"^blk\.({layers})\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight$=q4_0",
    ]


def test_folding_says_neither_more_nor_less():
    rng = np.random.default_rng(1)
    for _ in range(200):
        names = {".".join(rng.choice(list("ab+"), rng.integers(1, 5))) for _ in range(20)}
        named = {name: int(rng.integers(2)) for name in sorted(names)}
        every = {".".join(parts) for length in range(1, 5) for parts in itertools.product("ab+", repeat=length)}
        folded = rules.fold(named, ".")
        for name in every:
            found = [value for pattern, value in folded if re.fullmatch(pattern, name)]
            assert found == ([named[name]] if name in named else [])
    assert rules.fold({}, ".") == []


def one(path="layers.0.mlp.up_proj.kernel", text="int4_g32", **fields):
    spec = dataclasses.replace(weight(path), **fields)
    return {path: parse_scheme(text)}, [spec]


@pytest.mark.parametrize(
    ("write", "case", "message"),
    [
        (
            rules.llama_cpp,
            one(text="int4_g64"),
            r"layers\.0\.mlp\.up_proj\.kernel at int4_g64 has no type in llama\.cpp",
        ),
        (rules.llama_cpp, one(k=48), "has rows of 48, and blocks of llama.cpp hold 32"),
        (rules.llama_cpp, one("layer1.0.conv.kernel"), r"layer1\.0\.conv\.kernel has no GGUF name that is known here"),
        (rules.llama_cpp, one("layers.0.mlp.router.kernel"), "has no GGUF name"),
        (rules.qwix, one(text="int3_g32_zp"), "qwix has a zero point with int4 and int8 only"),
        (rules.qwix, one(text="nf3_g64"), "at nf3_g64 has no type in qwix, which takes int2, "),
        (rules.qwix, one(text="int4_g48"), "has rows of 64, no multiple of the groups of int4_g48"),
        (rules.qwix, one(index=(0,)), "has no module of its own"),
        (rules.qwix, one("kernel"), "has no module of its own"),
        (rules.compressed_tensors, one(text="nf4_g64"), "nf4_g64 has no form in compressed-tensors"),
        (rules.qwix, one(text="nvfp4"), "at fp4_g16_sfp8: rules for qwix say nothing of scales of 8 bits"),
        (rules.qwix, one(text="int8_tensor"), "at int8_tensor: qwix has no single scale of a weight"),
        (rules.compressed_tensors, one(text="int4_g32_se8m0"), "rules for compressed-tensors say nothing of scales of"),
        (rules.compressed_tensors, one(text="fp4_g32"), "fp4_g32 has no form in compressed-tensors"),
        (rules.compressed_tensors, one(batch=4), "has no form in compressed-tensors: it takes single matrices"),
    ],
)
def test_what_a_tool_has_no_form_for_names_the_weight(write, case, message):
    with pytest.raises(MpqError, match=message):
        write(*case)


def test_two_weights_of_one_module_need_one_scheme():
    weights = [weight("attention.query"), weight("attention.key")]
    choices = {"attention.query": parse_scheme("int4_g32"), "attention.key": parse_scheme("int8_g32")}
    for write in (rules.qwix, rules.compressed_tensors):
        with pytest.raises(
            MpqError, match=r"attention\.key shares module '(model.)?attention' with a weight at another scheme"
        ):
            write(choices, weights)
    same = dict.fromkeys(choices, parse_scheme("int4_g32"))
    assert rules.qwix(same, weights) == [{"module_path": "attention", "weight_qtype": "int4", "tile_size": 32}]


def test_experts_are_one_tensor_of_llama_cpp():
    assert (
        rules.llama_cpp(*one("layers.3.mlp.experts.up_proj.kernel", batch=8))
        == "^blk\\.3\\.ffn_up_exps\\.weight$=q4_0\n"
    )
