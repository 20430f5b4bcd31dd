"""`mpq sensitivity` scores on no text that rounding saw."""

import numpy as np
import pytest

from mpq import artifacts
from mpq.data import divide, new_dataset, row_digests
from mpq.data.sources import read_set
from mpq.models import load
from tests import tiny
from tests.command import exit_code

TEXT = ["--data", "text.txt", "--window", "32", "--batch-size", "4"]
SCORED = [*TEXT, "--metric", "weight_mse", "--schemes", "int4_g16", "--max-windows", "6", "-o", "table", "--json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("apart")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(documents=40))
    return root


@pytest.fixture
def mpq(capsys, place, monkeypatch):
    """Runs a command; gives its exit code and what it said on standard error."""
    monkeypatch.chdir(place)
    return lambda *arguments: (exit_code(*arguments), capsys.readouterr().err)


def rows(place, limit):
    return read_set(load(str(place / "model")), str(place / "text.txt"), "calibration", window=32, limit=limit)


def test_windows_of_given_statistics_are_left_out(mpq, place):
    assert mpq("calibrate", "model", *TEXT, "--max-windows", "12", "-o", "stats", "--json")[0] == 0
    assert mpq("sensitivity", "model", *SCORED, "--method", "gptq", "--stats", "stats")[0] == 0
    _, seen = artifacts.load_stats(place / "stats", load(str(place / "model")).digest)
    data = rows(place, 18)
    left = np.arange(12, 18)
    others = new_dataset(data.inputs[left], data.mask[left], data.document[left], data.source)
    assert seen == {*row_digests(rows(place, 12))}
    assert artifacts.load_table(place / "table")[0].data_digest == others.digest


def test_statistics_that_nobody_gave_are_of_other_windows(mpq, place):
    assert mpq("sensitivity", "model", *SCORED, "--method", "gptq")[0] == 0
    assert artifacts.load_table(place / "table")[0].data_digest == divide(rows(place, 6 + 64), 6)[0].digest


def test_rounding_that_sees_no_data_leaves_nothing_out(mpq, place):
    assert mpq("sensitivity", "model", *SCORED)[0] == 0
    assert artifacts.load_table(place / "table")[0].data_digest == rows(place, 6).digest


def test_a_text_that_was_seen_whole_is_refused(mpq, place):
    assert mpq("calibrate", "model", *TEXT, "--max-windows", "9999", "-o", "all", "--json")[0] == 0
    code, said = mpq("sensitivity", "model", *SCORED, "--method", "gptq", "--stats", "all")
    assert code == 2
    assert "are among those that all was made of, on which rounding errors are smaller than elsewhere" in said
