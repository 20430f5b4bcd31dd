"""Plans for one runtime: only what it has a form for, one scheme where it needs that, and export takes them all."""

import json

import numpy as np
import pytest

from mpq import artifacts
from mpq.export.targets import TARGETS, allowed_for
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.request import Request
from mpq.types import MpqError, SensitivityTable
from tests import tiny
from tests.command import exit_code

SCHEMES = ("int2_g32", "int4_g32", "int8_channel", "q8_0", "nf4_g32_sfloat32", "bf16")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> SensitivityTable:
    """Losses that fall with the width, twice as fast in every other weight."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("for") / "model", tiny.CONFIG | {"tie_word_embeddings": False})
    weights, schemes = load(str(folder)).trace(1, 16).weights, tuple(map(parse_scheme, SCHEMES))
    bits = np.array([scheme.size_bits(64, 64) / 4096 for scheme in schemes])
    loss = np.array([[(1 + i % 2) * 4.0 ** (-b) for b in bits] for i in range(len(weights))])
    return SensitivityTable(weights, schemes, loss, 0.01 * loss, "test", "rtn", "model", "data")


def message_of(call) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
def test_a_plan_for_a_runtime_has_only_what_it_has(table, name):
    request = Request(bpw=12.0 if name == "llm_int8" else 9.0, runtime=name)  # int8 beside embeddings in 16 bits
    choice = request.solve(request.problem(table, 0), [], table).choice
    for spec in table.weights:
        assert TARGETS[name].refusal(spec, choice[spec.path]) is None, spec.path
    scaled = {str(scheme) for scheme in choice.values() if scheme.has_scale}
    assert scaled
    assert not TARGETS[name].uniform or len(scaled) == 1


def test_where_one_scheme_is_for_all_the_best_one_is_taken(table):
    for request in (Request(bpw=9.0, runtime="gptq"), Request(max_kl=0.2, runtime="gptq")):
        best = request.solve(request.problem(table, 0), [], table)
        for one in ("int2_g32", "int4_g32", "int8_channel"):
            sets = (f".*layers.*={one},bf16", "(embed|lm_head).*=bf16")
            try:
                other = Request(bpw=request.bpw, max_kl=request.max_kl, only=sets)
                other = other.solve(other.problem(table, 0), [], table)
            except MpqError:
                continue
            assert best.loss <= other.loss if request.bpw else best.size_bits <= other.size_bits


def test_rules_of_a_person_are_kept_beside_the_runtime_s(table):
    request = Request(bpw=9.0, pin=("layers.0.mlp.up_proj.*=int8_channel",), runtime="hf")
    assert str(request.solve(request.problem(table, 0), [], table).choice["layers.0.mlp.up_proj.kernel"]) == SCHEMES[2]
    request = Request(bpw=9.0, pin=("layers.0.mlp.up_proj.*=q8_0",), runtime="hf")
    assert "contradict each other on layers.0.mlp.gate_proj.kernel" in message_of(lambda: request.problem(table, 0))


def test_an_unknown_runtime_and_what_it_has_no_form_for(table):
    message = f"unknown format 'tvm': the valid ones are {', '.join(TARGETS)}"
    assert message_of(lambda: allowed_for("tvm", table)) == message
    no_floats = SensitivityTable(table.weights, table.schemes[:1], *([np.ones((len(table.weights), 1))] * 2), *"abcd")
    message = (
        "hf has no form for embed_tokens.embedding at any scheme of the table (int2_g32: transformers loads no "
        "quantized embedding, nor one that is head too): score bf16 too"
    )
    assert message_of(lambda: allowed_for("hf", no_floats)) == message


def test_no_plan_of_one_scheme(table):
    message = (
        "no plan with one scheme for all linear layers, which awq needs, keeps to what is asked: allow more, score "
        "more schemes, or use --for hf"
    )
    request = Request(bpw=1.0, runtime="awq")
    assert message_of(lambda: request.problem(table, 0)) == message


def test_the_command(table, tmp_path, capsys):
    artifacts.save_table(tmp_path / "table", table, {"other_bits": 0})
    arguments = ("--bpw", "9", "--for", "bnb", "-o", tmp_path / "plan", "--json")
    assert exit_code("allocate", tmp_path / "table", *arguments) == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    assert set(choices.values()) == {"nf4_g32_sfloat32", "bf16"}
