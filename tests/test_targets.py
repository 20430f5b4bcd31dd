"""Plans for one runtime: only what it has a form for, one scheme where it needs that, and export takes them all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mpq import artifacts
from mpq.activations import ActivationTable, activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation
from mpq.activations.table import load_activation_table, save_activation_table
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.graphs import rounded_rows
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS, allowed_for
from mpq.formats import parse_scheme
from mpq.litert.activations import Rounded
from mpq.models import Model, load
from mpq.request import Request
from mpq.types import MpqError, SensitivityTable
from tests import tiny
from tests.command import exit_code
from tests.runtime_cases import noise

SCHEMES = ("int2_g32", "int4_g32", "int8_channel", "q8_0", "nf4_g32_sfloat32", "bf16")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("for") / "model"
    return load(str(tiny.write_folder(folder, tiny.CONFIG | {"tie_word_embeddings": False})))


@pytest.fixture(scope="module")
def table(model) -> SensitivityTable:
    """Losses that fall with the width, twice as fast in every other weight."""
    weights, schemes = model.trace(1, 16).weights, tuple(map(parse_scheme, SCHEMES))
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


ROUNDINGS = {
    "hf": ("int8_token", "int8_tensor_static_asym"),
    "llm_int8": ("int8_token", "int8_token_outlier4", "int8_token_outlier6"),
    "litert": ("int8_token_asym", "int8_tensor_static"),
    "onnx": ("int4_token", "int8_tensor_static"),
}


def scores(model: Model, schemes: tuple[str, ...], path) -> Path:
    """A table of activations, its losses of any size; every row prefers another scheme."""
    rows, found = activation_rows(model.trace(1, 16)), tuple(map(parse_activation_scheme, schemes))
    loss = np.random.default_rng(0).uniform(1e-3, 2e-3, (len(rows), len(found)))
    save_activation_table(path, ActivationTable(rows, found, loss, 0.01 * loss, "test", "both", "model", "data"))
    return path


def planned(request: Request, model: Model, table: SensitivityTable, folder: Path) -> Exported:
    """The best plan, its weights at any codes."""
    joint = request.joint(request.problem(table, 0), table)
    choice = request.solve(joint.problem, request.joint_limits(joint), table).choice
    weights, activations = joint.weights(choice), joint.activations(choice)
    ends = lambda body: np.float32([[-1], [2]]) if "static" in body["scheme"] else None
    chosen = [RoundedActivation.from_json(body, ends(body)) for body in activations.values()]
    plan = artifacts.make_plan("plan", weights, None, table.weights, 0, "model", activations)
    make = noise(model)
    qtensors = {spec.path: make(spec, weights[spec.path]) for spec in table.weights}
    orbax.save(folder, **export_arguments(model, table.weights, qtensors, plan, chosen))
    return orbax.load(folder)


LIMITS = {"hf": (40, 130), "llm_int8": (130, 200), "litert": (40, 90), "onnx": (40, 90)}
"""Bit operations a product; with weights of 16 bits and inputs as they are it is 256."""


@pytest.mark.parametrize(("name", "limit"), [(name, limit) for name, limits in LIMITS.items() for limit in limits])
def test_a_plan_that_rounds_activations_has_pairs_that_the_runtime_takes(model, table, tmp_path, name, limit):
    macs, path = sum(spec.macs for spec in table.weights), scores(model, ROUNDINGS[name], tmp_path / "scores")
    request = Request(bpw=16.0, runtime=name, activations=path, max_bops=limit * macs)
    exported = planned(request, model, table, tmp_path / "q")
    rounded = exported.plan["activations"]
    if name == "litert":  # what is left of its checks needs its schema
        found = Rounded.of(exported)
        assert len(found.hybrid) + len(found.static) == sum(len(row["weights"]) for row in rounded.values())
    elif name == "onnx":
        rounded_rows(exported, model, name, TARGETS[name].rounding_refusal)
    else:
        assert TARGETS[name].size_bytes(exported, "x") > 0
    schemes = {row["scheme"] for row in rounded.values()}
    assert schemes
    assert len(schemes) == (1 if name == "llm_int8" else 2)


def test_where_all_activations_have_one_scheme_it_is_the_best_one(model, table, tmp_path):
    macs = sum(spec.macs for spec in table.weights)
    losses = {}
    for name, some in {"all": ROUNDINGS["llm_int8"], **{one: (one,) for one in ROUNDINGS["llm_int8"]}}.items():
        path = scores(model, ROUNDINGS["llm_int8"], tmp_path / name)
        numbers = [ROUNDINGS["llm_int8"].index(one) for one in some]
        whole = load_activation_table(path)
        if len(numbers) == 1:
            save_activation_table(path, whole.at(numbers[0]))
        for limit in ({"max_bops": 150 * macs, "bpw": 16.0}, {"max_kl": 0.01}):
            request = Request(runtime="llm_int8", activations=path, **limit)
            joint = request.joint(request.problem(table, 0), table)
            solved = request.solve(joint.problem, request.joint_limits(joint), table)
            losses[name, "max_kl" in limit] = solved.size_bits if "max_kl" in limit else solved.loss
    for smallest in (False, True):
        found = {one: losses[one, smallest] for one in ROUNDINGS["llm_int8"]}
        assert losses["all", smallest] == min(found.values()) < max(found.values())


class TestWhatCannotBeAsked:
    def test_a_rounding_that_a_runtime_has_not(self, model, table, tmp_path):
        path = scores(model, ("int8_tensor",), tmp_path / "scores")
        request = Request(bpw=16.0, runtime="hf", activations=path)
        assert message_of(lambda: request.joint(request.problem(table, 0), table)) == (
            "hf has no form for layers.0.self_attn.{q,k,v}_proj.kernel at int8_tensor: inputs are rounded there as "
            "they are, by int8_token, int8_tensor_static or int8_tensor_static_asym; leave it out"
        )

    @pytest.mark.parametrize(
        ("name", "scheme", "reason"),
        [
            ("litert", "int8_token", "as they come inputs are rounded by int8_token_asym there, those of convolutions"),
            ("litert", "int4_tensor_static", "static ranges are of whole tensors in 8 bits; leave it out"),
            ("llm_int8", "int8_token_outlier6_static", "inputs are rounded there as they are, by int8_token; leave"),
        ],
    )
    def test_what_the_other_runtimes_have_not(self, model, table, tmp_path, name, scheme, reason):
        request = Request(bpw=16.0, runtime=name, activations=scores(model, (scheme,), tmp_path / "scores"))
        message = message_of(lambda: request.joint(request.problem(table, 0), table))
        first = "layers.0.self_attn.{q,k,v}_proj.kernel"
        assert message.startswith(f"{name} has no form for {first} at {scheme}: {reason}")

    def test_one_scheme_for_all_where_none_is_enough(self, model, table, tmp_path):
        path = scores(model, ROUNDINGS["llm_int8"], tmp_path / "scores")
        request = Request(bpw=16.0, runtime="llm_int8", activations=path, max_bops=1e6)
        assert message_of(lambda: request.joint(request.problem(table, 0), table)) == (
            "no plan with one scheme for all activations, which llm_int8 needs, keeps to what is asked: allow more, or "
            "score more schemes"
        )

    def test_int8_whose_inputs_have_no_losses(self, model, table, tmp_path):
        path = scores(model, ("int8_token",), tmp_path / "scores")
        whole = load_activation_table(path)
        parts = {"loss_increase": whole.loss_increase[1:], "stderr": whole.stderr[1:]}
        save_activation_table(path, dataclasses.replace(whole, activations=whole.activations[1:], **parts))
        pins = ("layers.0.self_attn.q_proj.*=int8_channel",)
        request = Request(bpw=16.0, runtime="hf", activations=path, pin=pins)
        assert message_of(lambda: request.joint(request.problem(table, 0), table)) == (
            "no scheme of layers.0.self_attn.{q,k,v}_proj.kernel goes with one of its inputs for this runtime: score "
            "more schemes of either, bf16 for weights whose inputs have no losses"
        )


def test_the_command(table, tmp_path, capsys):
    artifacts.save_table(tmp_path / "table", table, {"other_bits": 0})
    arguments = ("--bpw", "9", "--for", "bnb", "-o", tmp_path / "plan", "--json")
    assert exit_code("allocate", tmp_path / "table", *arguments) == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    assert set(choices.values()) == {"nf4_g32_sfloat32", "bf16"}
