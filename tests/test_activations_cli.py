"""`mpq sensitivity --of activations` and `--of kv`, and one sentence with exit code 2 for what is wrong."""

import json
import re

import numpy as np
import pytest

from mpq import cli
from mpq.activations import load_activation_table
from tests import tiny
from tests.command import exit_code

SMALL = ["--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(seed=1))
    return root


@pytest.fixture
def sensitivity(place, capsys, monkeypatch):
    """Runs the command; gives exit code and what it printed."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = exit_code("sensitivity", "model", *SMALL, *arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_cache_is_scored_and_told_in_bytes_a_token(sensitivity, place):
    code, out, _ = sensitivity("--of", "kv", "--metric", "kl", "--schemes", "int4_head", "-o", "cache", "--json")
    assert code == 0
    body = json.loads(out)
    assert body["activations"] == [f"layers.{i}.self_attn.{n}_proj.kernel" for i in (0, 1) for n in "kv"]
    assert body["values_per_token"] == [16] * 4
    assert body["bytes_per_token"] == [[(16 * 4 + 2 * 16) / 8]] * 4
    table = load_activation_table(place / "cache")
    assert {(row.width, row.heads) for row in table.activations} == {(16, 2)}
    np.testing.assert_array_equal(table.loss_increase, body["loss_increase"])
    assert (table.loss_increase > 0).all()
    written = (place / "cache").read_bytes()
    assert len(list((place / "scores").rglob("*.json"))) == 2 * 4  # batches and rows
    sensitivity("--of", "kv", "--metric", "kl", "--schemes", "int4_head", "-o", "cache")
    assert (place / "cache").read_bytes() == written


def test_a_person_gets_a_table_of_activations(sensitivity, place):
    code, out, _ = sensitivity("--of", "activations", "-o", "values")
    assert code == 0
    assert re.search(r"layers\.0\.self_attn\.\{q,k,v\}_proj\.kernel +│ 32 +│ \d", out)
    assert re.search(r"int4_token +┃ int6_token +┃ int8_token", out)
    assert "bytes per token" in out
    assert load_activation_table(place / "values").metric.startswith("fisher(")


WRONG = {
    "what": (["--of", "biases"], "unknown kind of row 'biases': the valid ones are weights, activations, kv"),
    "metric": (["--of", "kv", "--metric", "snr"], "unknown metric of activations 'snr': the valid ones are kl, fisher"),
    "scheme": (
        ["--of", "kv", "--schemes", "int4_channel"],
        "unknown activation scheme 'int4_channel': allowed is int2 to int8",
    ),
    "heads": (["--of", "activations", "--schemes", "int4_head"], "int4_head has a scale for every head, and layers.0"),
    "pattern": (["--of", "kv", "--keys-values", "none"], "no weight matches 'none': give a regular expression"),
    "head dim": (["--of", "kv", "--head-dim", "7"], "fall into no heads of 7: give head-dim"),
    "method": (["--of", "kv", "--method", "gptq"], "--method, --stats and --race are of weights: leave them out"),
    "stats": (["--of", "activations", "--stats", "s"], "leave them out with --of activations"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(sensitivity, arguments, message):
    code, _, err = sensitivity(*arguments, "-o", "x")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_table_of_activations_is_no_table_of_weights(sensitivity, capsys):
    sensitivity("--of", "kv", "--metric", "kl", "--schemes", "int4_head", "-o", "cache", "--json")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["allocate", "cache", "--bpw", "4", "-o", "x"])
    assert "cache is no sensitivity file (it is 'activations')" in capsys.readouterr().err
