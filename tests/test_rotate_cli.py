"""`mpq rotate` and `mpq quantize --rotate`: folders that hold the rotated model, whatever is done to it next."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mpq.equalize import rotate
from mpq.export import orbax
from mpq.export.targets import TARGETS
from mpq.inputs import Dataset
from mpq.models import load
from mpq.models.untied import TIED
from mpq.quantize import RTN, Candidates
from tests import decoder_cases, tiny
from tests.command import exit_code
from tests.runtime_cases import exported

TEXT = ("--data", "text.txt", "--window", "16", "--max-windows", "4", "--batch-size", "4")
HEAD = (
    "`lm_head.kernel` is a table of its own now, for the scale of the last norm cannot go into `embed_tokens.embedding`"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rotated")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text())
    return root


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in the folder and gives what it prints."""
    monkeypatch.chdir(folder)

    def command(*arguments):
        assert exit_code(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return command


def logits(source):
    model = load(source)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 16), dtype=np.int32)
    return np.asarray(jax.jit(model.apply)(model.params, tokens))


def test_the_rotated_model_is_a_folder_that_other_stages_read(run):
    told = run("rotate", "model", *TEXT, "--seed", "3", "-o", "turned")
    assert (told["rotated_stream"], told["rotated_values"]) == (32, 2)
    assert 0 < told["change_of_bound"] <= 1
    assert told["warnings"] == [HEAD]
    want = logits("model")
    # as the bound: float32 of logits of this size
    np.testing.assert_allclose(logits("turned"), want, rtol=0, atol=1e-4 * np.abs(want).max())
    told = run("quantize", "turned", "int8_g16", "--method", "rtn", "-o", "eight")
    assert told["bits_per_weight"] == 9
    assert run("evaluate", "eight", *TEXT, "--reference", "model")["kl"] < 0.01


def test_a_plan_of_the_original_is_kept_and_its_head_takes_the_scheme_of_the_table(run):
    run("sensitivity", "model", *TEXT, "--metric", "weight_mse", "--schemes", "int6_g16", "int8_g16", "-o", "s.json")
    run("allocate", "s.json", "--bpw", "8.5", "-o", "plan.json")
    told = run("quantize", "model", "plan.json", *TEXT, "--rotate", "--method", "rtn", "-o", "planned")
    assert told["warnings"] == [HEAD]
    choices, kept = (json.loads(Path(p).read_text()) for p in ("plan.json", "planned/mpq.json"))
    kept = kept["plan"]["choices"]
    assert kept.pop("lm_head.kernel") == choices["choices"]["embed_tokens.embedding"]
    assert kept == choices["choices"]
    assert told["payload_bytes"] == told["size_bytes"]
    scores = run("evaluate", "planned", *TEXT, "--reference", "model")  # tied or not, the same inputs and outputs
    assert 0 < scores["kl"] < 0.05


@pytest.mark.parametrize(
    ("plan", "more"),
    [
        ("int4_g16", ("--propagate", "--distill", "2", "--method", "rtn")),
        pytest.param(
            "int8_g16+int8_tensor_static_absmax+int8_head", ("--smooth", "--method", "rtn"), marks=pytest.mark.slow
        ),
    ],
)
def test_what_comes_after_sees_the_rotated_model(run, plan, more):
    out = f"out{more[0]}"
    told = run("quantize", "model", plan, *TEXT, "--rotate", *more, "-o", out)
    assert told["rotated_stream"] == 32
    exported = orbax.load(out)
    assert exported.config[TIED] is False
    np.testing.assert_array_equal(exported.params["layers.1.input_layernorm.scale"], 1.0)
    assert run("evaluate", out, *TEXT, "--reference", "model")["kl"] < 0.3
    if "--smooth" in more:
        rows = exported.plan["activations"]
        assert rows["lm_head.kernel"]["weights"] == ["lm_head.kernel"]
        assert exported.ranges.keys() == {path for path, row in rows.items() if row["kind"] == "activation"}


def test_a_checkpoint_for_transformers_holds_the_rotated_weights(run, folder):
    model = load("model")
    tokens = np.zeros((1, 12), np.int32) + np.arange(12, dtype=np.int32)
    data = Dataset(tokens, np.ones(tokens.shape, bool), np.zeros(1, np.int32), "counting", "0")
    turned = rotate(model, model.trace(1, 12), data, jax.random.key(0)).model
    rounded = Candidates(turned.params, turned.trace(1, 16).weights, RTN()).qtensor
    exported(turned, ("int8_g32", "fp16"), folder / "orbax", TARGETS["hf"].refusal, rounded)
    run("export", "orbax", "--to", "hf", "-o", "hf")
    want, original = logits("orbax"), logits("model")
    assert 0 < np.abs(want - original).max() < 0.1 * np.abs(original).max()
    np.testing.assert_array_equal(logits("hf"), want)  # the same codes, scales and norms
    assert json.loads((folder / "hf" / "config.json").read_text())[TIED] is False


def test_what_does_not_go_together_is_refused(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    message = (
        "mpq: --rotate needs --data TEXT, from which statistics and ranges of the rotated model come: leave out "
        "--stats and --ranges"
    )
    for wrong in (["--method", "rtn"], [*TEXT, "--stats", "s"], [*TEXT, "--ranges", "r"]):
        assert exit_code("quantize", "model", "int4_g16", *wrong, "--rotate", "-o", "x") == 2
        assert capsys.readouterr().err.strip() == message
    assert exit_code("rotate", "model", *TEXT, "-o", "model") == 2
    assert capsys.readouterr().err.strip() == "mpq: model exists already: choose another folder or remove it"
    assert not (folder / "x").exists()


def test_values_alone_are_rotated_where_the_stream_cannot_be(run, folder):
    decoder_cases.write(folder / "gemma", "gemma2")
    tiny.tokenizer(40).save(str(folder / "gemma" / "tokenizer.json"))
    told = run("rotate", "gemma", *TEXT[:2], "--window", "8", "-o", "gemma_turned")
    assert (told["rotated_stream"], told["rotated_values"]) == (0, 2)
    assert told["warnings"] == [
        "values of heads are rotated alone: the residual stream cannot be rotated before "
        "`layers.0.mlp.gate_proj.kernel`: `layers.0.post_attention_layernorm.scale` acts on its features one by one"
    ]
