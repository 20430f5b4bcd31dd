"""`mpq.distill.harmless`: what training makes worse for other data is not handed out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mpq import cli
from mpq.data import divide
from mpq.data.sources import read_set
from mpq.distill import Distill, distill_harmless
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.quantize import RTN, Candidates
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, a model, its trace, its weights at a scheme, and its text."""
    folder = tmp_path_factory.mktemp("harmless")
    tiny.write_folder(folder / "model")
    (folder / "text.txt").write_text(tiny.text(documents=20))
    model = load(str(folder / "model"))
    traced = model.trace(4, 16)
    candidates = Candidates(model.params, traced.weights, RTN(), None)
    rounded = lambda scheme: candidates.choose({w.path: parse_scheme(scheme) for w in traced.weights})
    data = read_set(model, str(folder / "text.txt"), "calibration", window=16, limit=24)
    return folder, model, traced, rounded, data


OPTIONS = Distill(steps=10, batch_size=4, written=0)
WILD = dataclasses.replace(OPTIONS, scale=1.0, rounding=1.0)


def test_training_that_helps_is_handed_out(made: Any) -> None:
    _, model, traced, rounded, data = made
    qtensors = rounded("int3_g16")
    found = distill_harmless(OPTIONS, model, traced, qtensors, data, key=jax.random.key(0))
    assert found.helped
    assert found.after < found.before
    rest = divide(data, 3)[1]
    alone = OPTIONS(model, traced, qtensors, rest, key=jax.random.key(0))
    np.testing.assert_array_equal(found.distilled.losses, alone.losses)  # it saw the rest alone
    jax.tree.map(np.testing.assert_array_equal, found.distilled.qtensors, alone.qtensors)


def test_training_that_harms_is_not(made: Any) -> None:
    _, model, traced, rounded, data = made
    qtensors = rounded("int8_g16")
    beside = {"norm": model.params[next(iter(model.params))]}
    found = distill_harmless(WILD, model, traced, qtensors, data, key=jax.random.key(0), beside=beside)
    assert not found.helped
    assert found.after > found.before
    assert found.distilled.qtensors == qtensors
    assert found.distilled.beside == beside
    assert len(found.distilled.losses) == WILD.steps


def test_few_windows_make_a_smaller_batch(made: Any) -> None:
    _, model, traced, rounded, data = made
    few = divide(data, 3)[0]  # two are left to train on
    found = distill_harmless(OPTIONS, model, traced, rounded("int3_g16"), few, key=jax.random.key(0))
    assert np.isfinite(found.distilled.losses).all()


def test_the_command_says_what_it_kept(
    made: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = made[0]
    options = ["--method", "rtn", "--distill", 10, "--json", "--data", folder / "text.txt", "--window", 16]

    def answer(out: str, scheme: str, training: Distill) -> dict[str, Any]:
        monkeypatch.setattr("mpq.commands_quantize.Distill", lambda: training)
        arguments = ["quantize", folder / "model", scheme, "-o", folder / out, *options]
        cli.main([str(a) for a in (*arguments, "--max-windows", 24, "--batch-size", 4)])
        return json.loads(capsys.readouterr().out)

    helped = answer("helped", "int3_g16", OPTIONS)
    assert helped["distilled"]
    assert helped["held_out_kl_distilled"] < helped["held_out_kl"]
    assert "warnings" not in helped
    harmed = answer("harmed", "int8_g16", WILD)
    assert not harmed["distilled"]
    assert harmed["warnings"] == ["training made the model worse on data that it did not see: the rounding stays"]
    assert harmed["held_out_kl"] < harmed["held_out_kl_distilled"]
