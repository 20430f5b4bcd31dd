"""A run that propagates and distills what it hands out: handed out is what is better on the selection set."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from analysis.load import parse_result
from analysis.report import write_run
from mpq import hand_out, pipeline, results, show
from mpq.distill import Distill, loop
from mpq.export import orbax
from mpq.hand_out import HandOut
from mpq.types import MpqError
from tests import tiny

NAME, BEST = "mixed@3.0bpw", "rtn+propagate+distill"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.run_config(
        tmp_path_factory.mktemp("distilled"),
        schemes=("int2_g16", "int4_g16"),
        metrics=("kl",),
        method="rtn",
        compare_methods=(),
        budgets=("3.0bpw",),
        hand_out="3.0bpw",
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
    assert body["exported"]["method"] == BEST
    assert HandOut(run).plan.name == NAME
    winner = body["winners"]["3.0bpw"]
    assert (winner["plan"], winner["method"]) == (NAME, BEST)
    kl = winner["ways_kl"]
    assert list(kl) == ["rtn", "rtn+propagate", BEST]
    assert kl[BEST] < kl["rtn+propagate"] < kl["rtn"]
    assert kl[BEST] < 0.8 * kl["rtn"]
    of = rows(body)
    assert [of[way]["kind"] for way in kl] == ["mixed", "propagated", "distilled"]
    assert [of[way]["handed_out"] for way in kl] == [True, False, True]  # plainly rounded it won its budget
    assert of[BEST]["kl"] < 0.8 * of["rtn"]["kl"]
    for way, row in of.items():
        for key in ("size_bytes", "choices", "predicted_kl"):
            assert row[key] == of["rtn"][key], way


def test_what_is_exported_is_what_was_measured(finished):
    run, body = finished
    exported = orbax.load(run.folder / "quantized")
    assert body["exported"]["kl"] == rows(body)[BEST]["kl"]
    distilled = HandOut(run).qtensors(HandOut(run).plan, BEST)
    for path, qtensor in distilled.items():
        np.testing.assert_array_equal(exported.qtensors[path].qvalue, qtensor.qvalue)
        assert str(qtensor.scheme) == rows(body)["rtn"]["choices"][path]
    changed = [
        not np.array_equal(q.qvalue, run.candidates["rtn"].qtensor(w, q.scheme).qvalue)
        for w in run.traced.weights
        for q in [distilled[w.path]]
    ]
    assert any(changed)


def test_a_person_sees_what_each_way_did(finished):
    run, body = finished
    out = io.StringIO()
    show.run({"run": str(run.folder), "results": body}, Console(file=out, width=400))
    kl = ", ".join(f"{way} {value:.4g}" for way, value in body["winners"]["3.0bpw"]["ways_kl"].items())
    assert f"3.0bpw: {NAME} wins, with KL" in out.getvalue()
    made = f"KL of {NAME} on the selection set by how its weights are made: {kl}; {BEST} is taken"
    assert made in out.getvalue()
    assert parse_result(json.loads((run.folder / "results.json").read_text())).main_method == "rtn"
    write_run(run.folder)
    page = (run.folder / "report.html").read_text()
    assert BEST.upper() in page
    assert f"Handed out is {NAME}, distilled, which loses" in page


def test_interrupted_it_continues_to_the_same_bytes(finished, config, tmp_path, monkeypatch):
    done, _ = finished
    monkeypatch.setattr(pipeline, "load", lambda source: done.model)
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 55:  # after the state of 50 steps was written
            raise KeyboardInterrupt
        return rows_of(self, *args)

    rows_of = loop.Distill._rows
    monkeypatch.setattr(loop.Distill, "_rows", interrupted)
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
    monkeypatch.setattr(hand_out, "Distill", lambda **options: Distill(**options, rounding=5.0, scale=1.0))
    monkeypatch.setattr(hand_out.Distill, "batch_size", 8, raising=False)
    run = pipeline.prepare(dataclasses.replace(config, distill_steps=5, propagate=False), tmp_path)
    body = results.finish(run, "mpq run tiny")
    kl = body["winners"]["3.0bpw"]["ways_kl"]
    assert list(kl) == ["rtn", "rtn+distill"]
    assert kl["rtn+distill"] > kl["rtn"]
    assert body["exported"]["method"] == "rtn"
    assert not rows(body)["rtn+distill"]["handed_out"]
    out = io.StringIO()
    show.run({"run": str(run.folder), "results": body}, Console(file=out, width=400))
    assert "; rtn is taken" in out.getvalue()


def test_activations_are_rounded_in_training_too(finished, config, tmp_path, monkeypatch):
    done, _ = finished
    monkeypatch.setattr(pipeline, "load", lambda source: done.model)
    few = dataclasses.replace(config, distill_steps=20, propagate=False, activations="int3_tensor_static")
    run = pipeline.prepare(few, tmp_path)
    hand = HandOut(run)
    (mixed, kl), data = (hand.plan, hand.ways["3.0bpw"]), run.sets["calibration"]
    blind = Distill(steps=20, batch_size=min(Distill.batch_size, len(data.inputs)))(
        run.model, run.traced, hand.qtensors(mixed, "rtn"), data, key=jax.random.key(few.seed)
    )
    without = run.measured("blind", lambda: run.params(blind.qtensors, blind.beside), "selection").summary().kl
    assert kl["rtn+distill"] < min(without, kl["rtn"])


def test_steps_below_zero_are_refused(config):
    with pytest.raises(MpqError, match="distill_steps is -1: it must be at least 0, which is no distillation"):
        dataclasses.replace(config, distill_steps=-1).check()
