"""The fixed mix: which weights get more, in every kind of model, and that it keeps to the budget and to the rules."""

import json

import numpy as np
import pytest

from mpq.allocate import Problem, heuristic, uniform
from mpq.allocate.heuristic import preferred
from mpq.models import load_shapes
from mpq.types import MpqError
from tests import decoder_cases, vision_cases
from tests.allocate_cases import SCHEMES, make_problem, table, weight
from tests.test_families_encoder import CONFIG as BERT

ROLES = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def decoder(layers, name="layers.{}.{}.kernel"):
    """Weights of a decoder with an untied head; query and key are left out."""
    blocks = [weight(name.format(layer, role)) for layer in range(layers) for role in ROLES]
    return [weight("embed_tokens.embedding"), *blocks, weight("lm_head.kernel")]


def problem_of(weights, schemes=SCHEMES[:5:2], **rules):
    return Problem.from_table(table(weights, np.zeros((len(weights), len(schemes))), schemes=schemes), **rules)


@pytest.mark.parametrize(
    ("layers", "more"),
    [  # read off the rule by hand
        (1, [0]),
        (2, [1]),
        (3, [2]),
        (8, [0, 3, 6, 7]),
        (22, [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]),
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
    ],
)
@pytest.mark.parametrize("name", ["layers.{}.{}.kernel", "layers.{1}.kernel[{0}]"])
def test_layers_that_get_more_are_those_of_llama_cpp(layers, more, name):
    expected = {name.format(i, role) for i in more for role in ("self_attn.v_proj", "mlp.down_proj")}
    assert set(preferred(decoder(layers, name))) == expected | {"lm_head.kernel"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (decoder_cases.config_of("llama"), {"layers.1.self_attn.v_proj", "layers.1.mlp.down_proj", "lm_head"}),
        (decoder_cases.config_of("phi3"), {"layers.1.self_attn.qkv_proj", "layers.1.mlp.down_proj", "lm_head"}),
        (decoder_cases.config_of("gpt2"), {"layers.1.self_attn.qkv_proj", "layers.1.mlp.down_proj", "embed_tokens"}),
        (
            decoder_cases.config_of("qwen2_moe"),
            {"layers.1.self_attn.v_proj", "layers.1.mlp.experts.down_proj", "layers.1.mlp.shared_expert.down_proj"}
            | {"lm_head"},
        ),
        (BERT, {"layers.1.attention.value", "layers.1.output"}),
        (vision_cases.VIT, {"layers.1.attention.value", "layers.1.output", "heads.0"}),
        (vision_cases.TEACHER, {"layers.1.attention.value", "layers.1.output", "heads.0", "heads.1"}),
        (vision_cases.CIFAR, {"conv1", "linear"}),
        (vision_cases.MOBILENET, {"conv_stem.first_conv.convolution", "classifier"}),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_the_weights_that_get_more_are_found_in_every_kind_of_model(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(vision_cases.PREPROCESSOR))
    found = preferred(load_shapes(str(tmp_path)).trace().weights)
    assert {path.removesuffix(".kernel").removesuffix(".embedding") for path in found} == expected
    assert len(found) == len(set(found))


def test_the_largest_base_that_fits_is_taken():
    problem = problem_of(decoder(8))
    more = set(preferred(decoder(8)))
    sizes = []
    for base, larger in ((0, 1), (1, 2)):
        expected = {w.path: SCHEMES[2 * (larger if w.path in more else base)] for w in decoder(8)}
        size = sum(w.size_bits(expected[w.path]) for w in decoder(8))
        for budget in (size, size + 1):
            found = heuristic(problem, budget)
            assert found is not None
            assert (found.choice, found.size_bits, found.budget_bits) == (expected, size, budget)
            assert found.solver == f"heuristic-{SCHEMES[2 * base]}"
        sizes.append(size)
    below = heuristic(problem, sizes[1] - 1)
    assert below is not None
    assert below.size_bits == sizes[0]
    assert heuristic(problem, sizes[0] - 1) is None
    assert uniform(problem, SCHEMES[0]).size_bits < sizes[0]  # else this shows nothing


def test_a_single_scheme_leaves_nothing_to_give():
    problem = problem_of(decoder(2), SCHEMES[:1])
    assert heuristic(problem, problem.max_bits) is None


def test_fused_weights_take_the_scheme_of_the_one_that_gets_more():
    qkv = [weight(f"layers.0.self_attn.{part}_proj.kernel", group="qkv") for part in "qkv"]
    weights = [*qkv, weight("layers.0.self_attn.o_proj.kernel"), weight("layers.0.mlp.down_proj.kernel")]
    problem = problem_of(weights)
    found = heuristic(problem, problem.max_bits)
    assert found is not None
    assert [str(found.choice[w.path]) for w in weights] == ["int4_g64"] * 3 + ["int3_g64", "int4_g64"]


def test_pins_and_sets_are_kept():
    weights = decoder(2)
    only = {"layers.1.mlp.down_proj.*": ["int2_g64", "int3_g64"], "layers.0.mlp.up_proj.*": ["int4_g64"]}
    problem = problem_of(weights, pins={"lm_head.*": "int2_g64"}, only=only)
    found = heuristic(problem, problem.max_bits)
    assert found is not None
    assert found.solver == "heuristic-int3_g64"
    taken = {path: str(scheme) for path, scheme in found.choice.items()}
    assert taken["lm_head.kernel"] == "int2_g64"  # wanted int4
    assert taken["layers.1.mlp.down_proj.kernel"] == "int3_g64"  # wanted int4: the largest allowed below it
    assert taken["layers.0.mlp.up_proj.kernel"] == "int4_g64"  # wanted int3: nothing smaller is allowed
    assert taken["layers.1.self_attn.v_proj.kernel"] == "int4_g64"


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(MpqError, match="smallest reachable size"):
        heuristic(make_problem([[10, 20]], [[1.0, 0.0]]), 5)
