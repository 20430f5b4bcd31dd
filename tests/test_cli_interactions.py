"""`mpq interactions` and `mpq allocate --interactions` on a tiny model."""

import json

import numpy as np
import pytest

from mpq import artifacts, cli
from mpq.allocate import Problem
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code

SCHEMES = ["--schemes", "int2_g16", "int4_g16", "int8_channel"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("interactions")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(documents=40))
    text = ["--data", str(root / "text.txt"), "--window", "32", "--batch-size", "4"]
    for command, out in (("interactions", "pairs"), ("sensitivity", "table")):
        cli.main([command, str(root / "model"), *text, *SCHEMES, "-o", str(root / out), "--json"])
    return root


@pytest.fixture
def mpq(capsys, place, monkeypatch):
    """Runs a command; gives exit code and what it printed."""
    monkeypatch.chdir(place)

    def call(*arguments):
        return exit_code(*arguments), capsys.readouterr()

    return call


def test_the_strongest_pairs_are_shown(mpq, place):
    again = [
        "interactions",
        "model",
        "--data",
        "text.txt",
        "--window",
        "32",
        "--batch-size",
        "4",
        *SCHEMES,
        "-o",
        "two",
    ]
    code, printed = mpq(*again, "--json")
    body = json.loads(printed.out)
    strongest = [pair["correlation"] for pair in body["strongest"]]
    assert code == 0
    assert len(strongest) == 10
    assert strongest == sorted(strongest, reverse=True)
    assert 0 <= body["shrinkage"] <= 1
    assert (place / "two").read_bytes() == (place / "pairs").read_bytes()
    _, printed = mpq(*again)
    assert f"correlations are shrunk by {100 * body['shrinkage']:.0f} %" in printed.out


def test_they_survive_the_disk(place, tmp_path):
    pairs = artifacts.load_interactions(place / "pairs")
    artifacts.save_interactions(tmp_path / "again", pairs)
    again = artifacts.load_interactions(tmp_path / "again")
    np.testing.assert_array_equal(again.sketch, pairs.sketch)
    assert (again.weights, again.schemes, again.shrinkage) == (pairs.weights, pairs.schemes, pairs.shrinkage)
    with pytest.raises(MpqError, match="no file of statistics: run `mpq calibrate` again"):
        artifacts.load_stats(place / "pairs", pairs.model_digest)


def test_pairs_count_in_the_plan(mpq, place):
    table, _ = artifacts.load_table(place / "table")
    pairs = artifacts.load_interactions(place / "pairs")
    code, printed = mpq("allocate", "table", "--interactions", "pairs", "--bpw", "4", "-o", "plan", "--json")
    plan = json.loads(printed.out)
    assert code == 0
    assert plan["solver"] == "quadratic"
    assert plan["lower_bound"] <= plan["predicted_kl"]
    choice = Problem.from_table(table).schemes
    by_name = {str(scheme): scheme for scheme in choice}
    chosen = {path: by_name[scheme] for path, scheme in plan["choices"].items()}
    assert plan["predicted_kl"] == pytest.approx(pairs.predict(table, chosen))


@pytest.mark.parametrize("limit", [["--max-kl", "0.1"], ["--bpw", "4", "--max-bops", "1e9"]])
def test_other_limits_do_not_go_with_pairs(mpq, limit):
    code, printed = mpq("allocate", "table", "--interactions", "pairs", *limit, "-o", "x")
    assert code == 2
    assert "--interactions goes with a size alone" in printed.err


def test_a_table_of_other_candidates_is_refused(mpq):
    other = ["--window", "32", "--batch-size", "4", "--schemes", "int2_g16", "int4_g16", "-o", "other"]
    assert mpq("sensitivity", "model", "--data", "text.txt", *other)[0] == 0
    code, printed = mpq("allocate", "other", "--interactions", "pairs", "--bpw", "4", "-o", "x")
    assert code == 2
    assert "compute both from the same candidates" in printed.err
