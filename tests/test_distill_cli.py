"""`mpq quantize --distill`: a better file of the same size, continued where it stopped."""

import json

import numpy as np
import pytest

from mpq import cli
from mpq.distill import loop
from tests import tiny
from tests.command import exit_code

WINDOW = ("--window", "16", "--max-windows", "12", "--batch-size", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its text."""
    folder = tmp_path_factory.mktemp("distill-cli")
    tiny.write_folder(folder / "model")
    (folder / "text.txt").write_text(tiny.text(documents=20))
    return folder


def answer(capsys, *arguments):
    capsys.readouterr()
    cli.main([str(a) for a in (*arguments, "--json")])
    return json.loads(capsys.readouterr().out)


def quantize(folder, out, *options):
    return ("quantize", folder / "model", "int3_g16", "--method", "rtn", "-o", folder / out, *options, *WINDOW)


def test_the_distilled_file_is_better_and_of_the_same_size(folder, capsys):
    data = ("--data", folder / "text.txt")
    plain = answer(capsys, *quantize(folder, "plain"))
    better = answer(capsys, *quantize(folder, "better", "--distill", 30, *data))
    assert better["payload_bytes"] == plain["payload_bytes"]
    assert better["distill"] == 30
    assert better["last_loss"] < better["first_loss"]
    assert not list(folder.glob("*.distill"))
    kl = [
        answer(capsys, "evaluate", folder / out, *data, "--reference", folder / "model", *WINDOW)["kl"]
        for out in ("plain", "better")
    ]
    assert kl[1] < 0.9 * kl[0]


def test_interrupted_it_continues(folder, capsys, monkeypatch):
    arguments = quantize(folder, "continued", "--distill", 60, "--data", folder / "text.txt")

    def stopping(items, description, total=None):
        for item in items:
            if item == 55:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(loop, "track", stopping)
        assert exit_code(*arguments) == 2
    assert not (folder / "continued").exists()
    assert (folder / "continued.distill").exists()
    seen = []
    monkeypatch.setattr(loop, "track", lambda items, *_: (seen.append(i) or i for i in items))
    last = answer(capsys, *arguments)["last_loss"]
    assert (seen[0], seen[-1]) == (50, 59)
    assert not (folder / "continued.distill").exists()
    assert np.isfinite(last)


@pytest.mark.parametrize(
    ("options", "told"),
    [(("--distill", -1), "distill is -1"), (("--distill", 5), "distillation needs text: give --data TEXT")],
)
def test_what_cannot_be_asked_for(folder, capsys, options, told):
    assert exit_code(*quantize(folder, "wrong", *options)) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (folder / "wrong").exists()
