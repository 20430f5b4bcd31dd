"""A run that distills what it hands out: it is handed out distilled only where that is better."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from analysis.load import parse_result
from analysis.report import write_run
from mpq import pipeline, results, show
from mpq.config import RunConfig
from mpq.distill import Distill, loop
from mpq.export import orbax
from mpq.types import MpqError
from tests import tiny

NAME = "mixed@3.0bpw"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("distilled")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(documents=200))
    return RunConfig(
        name="tiny",
        model=str(root / "model"),
        data=str(root / "text.txt"),
        schemes=("int2_g16", "int4_g16"),
        metrics=("kl",),
        method="rtn",
        compare_methods=(),
        budgets=("3.0bpw",),
        hand_out="3.0bpw",
        window=32,
        batch_size=4,
        calibration_windows=24,
        selection_windows=12,
        test_windows=12,
        distill_steps=60,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = pipeline.prepare(config, tmp_path_factory.mktemp("runs"))
    return run, results.finish(run, "mpq run tiny")


def rows(body):
    return {p["method"]: p for p in body["plans"] if p["name"] == NAME}


def test_it_is_better_and_handed_out(finished):
    run, body = finished
    assert body["exported"]["method"] == "rtn+distill"
    assert run.handed_out[0].name == NAME
    kl = body["distilled"]["selection_kl"]
    assert kl["rtn+distill"] < 0.8 * kl["rtn"]
    rounded, distilled = rows(body)["rtn"], rows(body)["rtn+distill"]
    assert distilled["kl"] < 0.8 * rounded["kl"]
    assert distilled["kind"] == "distilled"
    assert distilled["handed_out"]
    for key in ("size_bytes", "choices", "predicted_kl"):
        assert distilled[key] == rounded[key]


def test_what_is_exported_is_what_was_measured(finished):
    run, body = finished
    exported = orbax.load(run.folder / "quantized")
    assert body["exported"]["kl"] == rows(body)["rtn+distill"]["kl"]
    for path, qtensor in run.distilled.items():
        np.testing.assert_array_equal(exported.qtensors[path].qvalue, qtensor.qvalue)
        assert str(qtensor.scheme) == rows(body)["rtn"]["choices"][path]
    changed = [
        not np.array_equal(q.qvalue, run.candidates["rtn"].qtensor(w, q.scheme).qvalue)
        for w in run.traced.weights
        for q in [run.distilled[w.path]]
    ]
    assert any(changed)


def test_a_person_sees_what_distillation_did(finished):
    run, body = finished
    out = io.StringIO()
    show.run({"run": str(run.folder), "results": body}, Console(file=out, width=400))
    kl = body["distilled"]["selection_kl"]
    assert (
        f"{NAME}: 60 steps of distillation take its KL on the selection set from {kl['rtn']:.4g} to "
        f"{kl['rtn+distill']:.4g} nats; it is handed out distilled"
    ) in out.getvalue()
    assert parse_result(json.loads((run.folder / "results.json").read_text())).main_method == "rtn"
    write_run(run.folder)
    assert "RTN+DISTILL" in (run.folder / "report.html").read_text()


def test_interrupted_it_continues_to_the_same_bytes(finished, config, tmp_path, monkeypatch):
    done, _ = finished
    monkeypatch.setattr(pipeline, "load", lambda source: done.model)
    calls = []

    def interrupted(rows, *args, **kwargs):
        calls.append(rows)
        if len(calls) == 55:  # after the state of 50 steps was written
            raise KeyboardInterrupt
        return varied(rows, *args, **kwargs)

    varied = loop.varied
    monkeypatch.setattr(loop, "varied", interrupted)
    run = pipeline.prepare(config, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        results.finish(run, "mpq run tiny")
    assert (run.folder / "distill.state").exists()
    assert not (run.folder / "distilled").exists()
    again = pipeline.prepare(config, tmp_path)
    results.finish(again, "mpq run tiny")
    assert len(calls) == 55 + 10  # steps 51 to 60
    assert not (again.folder / "distill.state").exists()
    for name in ("results.json", "quantized/mpq.json", "distilled/mpq.json"):
        assert (again.folder / name).read_bytes() == (done.folder / name).read_bytes()


def test_distillation_that_does_harm_is_not_handed_out(finished, config, tmp_path, monkeypatch):
    done, _ = finished
    monkeypatch.setattr(pipeline, "load", lambda source: done.model)
    monkeypatch.setattr(pipeline, "Distill", lambda **options: Distill(**options, rounding=5.0, scale=1.0))
    monkeypatch.setattr(pipeline.Distill, "batch_size", 8, raising=False)
    run = pipeline.prepare(dataclasses.replace(config, distill_steps=5), tmp_path)
    body = results.finish(run, "mpq run tiny")
    kl = body["distilled"]["selection_kl"]
    assert kl["rtn+distill"] > kl["rtn"]
    assert body["exported"]["method"] == "rtn"
    assert not rows(body)["rtn+distill"]["handed_out"]
    out = io.StringIO()
    show.run({"run": str(run.folder), "results": body}, Console(file=out, width=400))
    assert "it is handed out as it was rounded" in out.getvalue()


def test_steps_below_zero_are_refused(config):
    with pytest.raises(MpqError, match="distill_steps is -1: it must be at least 0, which is no distillation"):
        dataclasses.replace(config, distill_steps=-1).check()
