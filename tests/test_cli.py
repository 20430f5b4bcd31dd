"""The command line: every stage on a tiny model, and one sentence with exit code 2 for whatever is wrong."""

import dataclasses
import errno
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from mpq import artifacts, cli, show
from mpq.models import load
from tests import tiny
from tests.command import exit_code

WINDOW = ["--window", "32", "--batch-size", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and two texts."""
    root = tmp_path_factory.mktemp("cli")
    tiny.write_folder(root / "model")
    (root / "calibration.txt").write_text(tiny.text(seed=1))
    (root / "test.txt").write_text(tiny.text(seed=2))
    return root


@pytest.fixture
def mpq(capsys, place, monkeypatch):
    """Runs a command; gives exit code, the JSON it printed (or None), and what it said on standard error."""
    monkeypatch.chdir(place)

    def call(*arguments):
        code = exit_code(*arguments)
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 and "--json" in arguments else None, err

    return call


@pytest.fixture(scope="module")
def stages(place):
    """Statistics, tables and plans, each made once by its command."""
    here = lambda name: str(place / name)
    text = ["--data", here("calibration.txt"), *WINDOW]
    cli.main(["calibrate", here("model"), *text, "-o", here("stats"), "--json"])
    schemes = ["--schemes", "int2_g16", "int4_g16", "int8_channel", "fp32"]
    cli.main(["sensitivity", here("model"), *text, "--metric", "kl", *schemes, "-o", here("table"), "--json"])
    cli.main(["allocate", here("table"), "--bpw", "6", "-o", here("plan"), "--json"])
    cli.main(["quantize", here("model"), here("plan"), "--stats", here("stats"), "-o", here("quantized"), "--json"])
    return place


def test_inspect_counts_what_the_config_implies(mpq):
    code, body, _ = mpq("inspect", "model", "--json")
    assert code == 0
    assert len(body["weights"]) == 2 * 7 + 1
    assert body["parameters"] == sum(v.size for v in tiny.tensors().values())
    head = next(w for w in body["weights"] if w["uses"] == 2)
    assert (head["kind"], head["k"], head["n"]) == ("embedding+matmul", 32, 96)
    groups = {w["path"].split(".")[-2]: w["group"] for w in body["weights"] if w["path"].startswith("layers.1.")}
    assert groups["q_proj"] == groups["k_proj"] == groups["v_proj"] != groups["o_proj"]
    assert groups["gate_proj"] == groups["up_proj"] != groups["down_proj"]
    assert {s["path"] for s in body["skipped"]} == {p for p in load("model").params if "norm" in p}


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_person_gets_a_table(capsys, place, monkeypatch, command):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    cli.main([command, "model", *(["--all"] if command == "inspect" else ["--data", "test.txt", *WINDOW])])
    out = capsys.readouterr().out
    assert ("layers.0.self_attn.q_proj.kernel" in out) if command == "inspect" else ("perplexity" in out)


def test_the_plan_keeps_its_budget_and_its_groups(mpq, stages):
    code, body, _ = mpq("allocate", "table", "--bpw", "5", "-o", "plan5", "--json")
    assert code == 0
    assert {"size_bytes", "bits_per_weight", "predicted_kl", "predicted_stderr", "lower_bound", "gap", "status"} <= set(
        body
    )
    assert body["bits_per_weight"] <= 5
    assert body["status"] == "optimal"
    choices = body["choices"]
    assert choices["layers.0.self_attn.q_proj.kernel"] == choices["layers.0.self_attn.v_proj.kernel"]
    size = mpq("allocate", "table", "--size", f"{body['size_bytes']}B", "-o", "plan5s", "--json")[1]
    assert size["choices"] == choices
    loose = mpq("allocate", "table", "--max-kl", body["predicted_kl"] + 1e-12, "-o", "plan5k", "--json")[1]
    assert loose["size_bytes"] == body["size_bytes"]


def test_rules_hold_and_what_they_matched_is_told(mpq, stages, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rules = ["--pin", r".*\.v_proj\.kernel=int8_channel", "--only", r"layers\.1\..*=int2_g16,int8_channel"]
    code, body, _ = mpq("allocate", "table", "--bpw", "6", *rules, "-o", "ruled", "--json")
    assert code == 0
    matched = list(body["matched"].values())
    assert list(body["matched"]) == [r"--pin .*\.v_proj\.kernel=int8_channel", f"--only {rules[3]}"]
    assert matched[0] == [f"layers.{i}.self_attn.v_proj.kernel" for i in (0, 1)]
    assert {body["choices"][path] for path in matched[0]} == {"int8_channel"}
    assert len(matched[1]) == 7
    assert {body["choices"][path] for path in matched[1]} <= {"int2_g16", "int8_channel"}
    assert cli.main(["allocate", "table", "--bpw", "6", *rules, "-o", "ruled"]) is None
    printed = capsys.readouterr().out
    assert r"--pin .*\.v_proj\.kernel=int8_channel matched 2: layers.0.self_attn" in printed
    assert "(gap 0), optimal" in " ".join(printed.split())


def test_a_plan_is_written_for_another_tool_too(mpq, stages):
    rules = ["--rules", "qwix=qwix.json", "--rules", "compressed-tensors=vllm.json"]
    code, body, _ = mpq("allocate", "table", "--bpw", "6", *rules, "-o", "told", "--json")
    assert code == 0
    assert body["rules"] == ["qwix.json", "vllm.json"]
    written = json.loads((stages / "qwix.json").read_text())
    module = "layers/0/self_attn/q_proj"
    (rule,) = [r for r in written if re.fullmatch(r["module_path"], module)]
    assert body["choices"][f"{module.replace('/', '.')}.kernel"].startswith(rule["weight_qtype"] or "fp32")
    assert set(json.loads((stages / "vllm.json").read_text())) == {"config_groups", "ignore"}


def test_limits_beside_the_size_are_kept_and_told(mpq, stages):
    budget = ["allocate", "table", "--bpw", "6", "--json", "-o", "limited"]
    loose = mpq(*budget, "--max-bops", "1e15")[1]
    assert loose["limits"][0]["name"] == "BOPs"
    assert loose["solver"] == "highs"
    exact = mpq(*budget)[1]
    assert exact["limits"] == []
    assert loose["predicted_kl"] == pytest.approx(exact["predicted_kl"], rel=1e-9)
    speed = {"int2_g16": 1, "int4_g16": 2, "int8_channel": 3.5, "fp32": 9}
    shapes = {(w["k"], w["n"]) for w in json.loads((stages / "table").read_text())["weights"]}
    (stages / "times.json").write_text(json.dumps({f"{k}x{n}": speed for k, n in shapes}))
    asked = ["--latency", "times.json", "--max-latency-us", "30", "--max-bops", loose["limits"][0]["reached"] * 0.95]
    code, body, _ = mpq(*budget, *asked)
    assert code == 0
    assert [limit["name"] for limit in body["limits"]] == ["BOPs", "latency"]
    assert all(limit["reached"] <= limit["limit"] for limit in body["limits"])
    assert body["limits"][1]["reached"] == sum(1000 * speed[scheme] for scheme in body["choices"].values())
    assert body["predicted_kl"] > loose["predicted_kl"]


def test_the_quantized_folder_is_what_the_plan_says_and_evaluates(mpq, stages):
    plan = json.loads((stages / "plan").read_text())
    code, body, _ = mpq("evaluate", "quantized", "--data", "test.txt", "--reference", "model", *WINDOW, "--json")
    assert code == 0
    assert set(body) >= {"perplexity", "nll", "nll_stderr", "kl", "kl_stderr", "top1_agreement", "num_documents"}
    assert (body["size_bytes"], body["bits_per_weight"]) == (plan["size_bytes"], plan["bits_per_weight"])
    assert 0 < body["kl"] < 1
    same = mpq("evaluate", "model", "--data", "test.txt", "--reference", "model", *WINDOW, "--json")[1]
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["top1_agreement"] == 1
    assert same["perplexity"] != body["perplexity"]


def test_a_finer_scheme_is_closer_to_the_original(mpq, stages):
    kl = {}
    for scheme in ("int2_g16", "int4_g16", "int8_channel"):
        assert mpq("quantize", "model", scheme, "--method", "hqq", "-o", f"q-{scheme}", "--json")[0] == 0
        kl[scheme] = mpq("evaluate", f"q-{scheme}", "--data", "test.txt", "--reference", "model", *WINDOW, "--json")[1][
            "kl"
        ]
    assert kl["int2_g16"] > 4 * kl["int4_g16"] > 16 * kl["int8_channel"] > 0


def test_evaluation_without_reference_has_no_kl(mpq):
    body = mpq("evaluate", "model", "--data", "test.txt", *WINDOW, "--json")[1]
    assert body["kl"] is None
    assert body["size_bytes"] == 4 * sum(v.size for v in tiny.tensors().values())
    assert body["bits_per_weight"] == 32


BAD = {
    "a folder without a config": (["inspect", "empty"], r"config\.json"),
    "no such model": (["inspect", "./nothing"], "is no folder here"),
    "no such text": (["evaluate", "model", "--data", "no.txt"], "is no file or folder here"),
    "text too short": (["evaluate", "model", "--data", "short.txt", *WINDOW], "too short"),
    "window too long": (
        ["evaluate", "model", "--data", "test.txt", "--window", "999"],
        "longer than the model's context of 64",
    ),
    "batch of none": (["evaluate", "model", "--data", "test.txt", "--batch-size", "0"], "must be at least 1"),
    "unknown metric": (
        ["sensitivity", "model", "--data", "test.txt", "--metric", "magic", "-o", "x"],
        "unknown metric 'magic': the valid ones are kl, fisher, hessian_trace",
    ),
    "unknown scheme": (
        ["sensitivity", "model", "--data", "test.txt", "--schemes", "int9_g3", "-o", "x"],
        "unknown scheme 'int9_g3': allowed is a format of int2",
    ),
    "unknown method": (
        ["quantize", "model", "int4_g32", "--method", "magic", "-o", "x"],
        "the valid ones are rtn, hqq, gptq, gptq_act_order, signround, adaround, best",
    ),
    "gptq without data": (["quantize", "model", "int4_g32", "-o", "x"], "needs calibration: give --data"),
    "no such plan": (["quantize", "model", "plam.json", "-o", "x"], "neither a file nor a scheme"),
    "output exists": (["quantize", "model", "int4_g32", "--method", "rtn", "-o", "quantized"], "exists already"),
    "budget too small": (["allocate", "table", "--bpw", "1", "-o", "x"], "smallest"),
    "budget too small in bytes": (["allocate", "table", "--size", "1kB", "-o", "x"], "smallest"),
    "budget above the original": (["allocate", "table", "--bpw", "99", "-o", "x"], "largest|above"),
    "budget that is no size": (["allocate", "table", "--size", "many", "-o", "x"], "many"),
    "two budgets": (["allocate", "table", "--bpw", "4", "--size", "1MB", "-o", "x"], "exactly one of"),
    "no budget": (["allocate", "table", "-o", "x"], "exactly one of"),
    "a pin that is none": (["allocate", "table", "--bpw", "6", "--pin", "int8_channel", "-o", "x"], "is not a pattern"),
    "a pin given twice": (
        ["allocate", "table", "--bpw", "6", "--pin", "a=int8_channel", "--pin", "a=fp32", "-o", "x"],
        "--pin 'a' is given twice",
    ),
    "a rule that matches nothing": (
        ["allocate", "table", "--bpw", "6", "--only", "head=int8_channel", "-o", "x"],
        "only 'head' matches no weight; .* there are embed_tokens.embedding",
    ),
    "an unknown tool": (
        ["allocate", "table", "--bpw", "6", "--rules", "onnx=f", "-o", "x"],
        "--rules 'onnx=f' is not TOOL=FILE with a tool of llama.cpp, qwix, compressed-tensors",
    ),
    "a plan without a form there": (
        ["allocate", "table", "--bpw", "6", "--rules", "llama.cpp=f", "-o", "x"],
        "has no type in llama.cpp, which takes int4_g32",
    ),
    "a limit without its table": (
        ["allocate", "table", "--bpw", "6", "--max-latency-us", "5", "-o", "x"],
        "--latency and --max-latency-us go together",
    ),
    "a limit of loss and another": (
        ["allocate", "table", "--max-kl", "1", "--max-bops", "1e9", "-o", "x"],
        "--max-kl asks for the smallest size",
    ),
    "too few operations": (
        ["allocate", "table", "--size", "18kB", "--max-bops", "5", "-o", "x"],
        "BOPs of at most 5 bit operations cannot be met: the smallest reachable is",
    ),
    "no table of latencies": (
        ["allocate", "table", "--bpw", "6", "--latency", "no.json", "--max-latency-us", "5", "-o", "x"],
        "no.json",
    ),
    "unreachable loss": (["allocate", "table", "--max-kl", "-1", "-o", "x"], "smallest|reach"),
    "plan of another model": (["quantize", "other", "plan", "--method", "rtn", "-o", "x"], "made for another model"),
    "statistics of another model": (
        ["quantize", "other", "int4_g32", "--stats", "stats", "-o", "x"],
        "made for another model",
    ),
    "stale table": (["allocate", "stale", "--bpw", "4", "-o", "x"], "checksum differs"),
    "truncated table": (["allocate", "truncated", "--bpw", "4", "-o", "x"], "truncated|JSON"),
    "a plan is no table": (["allocate", "plan", "--bpw", "4", "-o", "x"], "is no sensitivity file"),
    "no such config": (["run", "no.py"], "does not exist"),
    "reference of another shape": (
        ["evaluate", "model", "--data", "test.txt", "--reference", "wide", *WINDOW],
        "their configs differ",
    ),
}


@pytest.fixture(scope="module")
def broken(stages):
    (stages / "empty").mkdir()
    (stages / "short.txt").write_text("x y z")
    tiny.write_folder(stages / "other", weights=tiny.tensors(seed=5))
    tiny.write_folder(stages / "wide", {**tiny.CONFIG, "intermediate_size": 96})
    table = (stages / "table").read_text()
    (stages / "stale").write_text(table.replace('"metric"', '"metrics"', 1))
    (stages / "truncated").write_text(table[:-40])
    return stages


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_input_ends_in_one_sentence(mpq, broken, case):
    arguments, message = BAD[case]
    before = sorted(p.name for p in broken.iterdir())
    code, _, err = mpq(*arguments)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("mpq: ")] == [err.splitlines()[-1]]
    assert sorted(p.name for p in broken.iterdir()) == before


def test_strict_inspection_fails_on_a_matrix_that_nothing_claims(mpq, monkeypatch):
    from mpq import commands

    class Unclaimed:
        weights = ()
        skipped = (type("Skipped", (), {"path": "embed_tokens.embedding", "reason": "it is added, not multiplied"})(),)

    monkeypatch.setattr(commands.Model, "trace", lambda self: Unclaimed())
    code, _, err = mpq("inspect", "model", "--strict")
    assert code == 2
    assert "'embed_tokens.embedding': it is added" in err


def test_a_weight_that_is_not_finite_is_named(mpq, place):
    weights = tiny.tensors()
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    tiny.write_folder(place / "infinite", weights=weights)
    code, _, err = mpq("evaluate", "infinite", "--data", "test.txt", *WINDOW)
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight" in err


def test_an_interrupt_is_one_sentence(mpq, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands, "evaluate", interrupt)
    code, _, err = mpq("evaluate", "model", "--data", "test.txt")
    assert code == 2
    assert "type the same command again" in err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(mpq, stages, monkeypatch):
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = mpq("allocate", "table", "--bpw", "6", "-o", "full-plan")
    assert code == 2
    assert "No space left" in err or "disk is full" in err or "full" in err
    assert not [p for p in stages.iterdir() if "full-plan" in p.name]


def test_other_errors_of_the_system_are_not_hidden(mpq, monkeypatch):
    def odd(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli.commands, "evaluate", odd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        mpq("evaluate", "model", "--data", "test.txt")


def test_sharded_and_single_checkpoints_evaluate_alike(mpq, place):
    tensors = tiny.tensors()
    folder = tiny.write_folder(place / "sharded")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(where.values()):
        save_file({n: v for n, v in tensors.items() if where[n] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    one, two = (mpq("evaluate", m, "--data", "test.txt", *WINDOW, "--json")[1] for m in ("model", "sharded"))
    assert one == two


def test_allocate_says_which_choices_are_sure(mpq, stages):
    _, body, _ = mpq("allocate", "table", "--bpw", "6", "-o", "sure", "--json")
    sure = body["stability"]
    assert list(sure["share"]) == list(body["choices"])
    assert sure["unsure"] == [path for path, part in sure["share"].items() if part < 0.95]
    assert mpq("allocate", "table", "--bpw", "6", "-o", "sure", "--json")[1]["stability"] == sure
    limited = mpq("allocate", "table", "--size", "18kB", "--max-bops", "1e12", "-o", "limited", "--json")[1]
    assert limited["stability"]["share"] is None
    assert "limits beside the size" in limited["stability"]["statement"]
    screen = io.StringIO()
    show.plan(body | {"stability": {**sure, "unsure": list(body["choices"])[:1]}}, Console(file=screen, width=200))
    assert re.search(r"≈ \(\d+ %\)", screen.getvalue())
    assert f"≈: {sure['statement']}" in screen.getvalue()


def test_a_table_of_one_document_is_allocated_and_says_that_errors_are_unknown(mpq, stages):
    table, body = artifacts.load_table(stages / "table")
    unknown = dataclasses.replace(table, stderr=np.full_like(table.stderr, np.nan))
    artifacts.save_table(stages / "one-document", unknown, {"other_bits": body["other_bits"]})
    code, found, _ = mpq("allocate", "one-document", "--bpw", "6", "-o", "one-document-plan", "--json")
    known = mpq("allocate", "table", "--bpw", "6", "-o", "known-plan", "--json")[1]
    assert code == 0
    assert found["choices"] == known["choices"]
    assert found["predicted_stderr"] is None
    assert found["stability"]["share"] is None
    assert "no standard errors (one document or probe)" in found["stability"]["statement"]


def test_the_frontier_is_drawn(mpq, stages):
    assert mpq("allocate", "table", "--bpw", "6", "-o", "drawn", "--frontier", "frontier.png", "--json")[0] == 0
    assert (stages / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_job_on_a_person_s_own_model_and_text(mpq, place, capsys):
    (place / "config.py").write_text(
        "from mpq.config import RunConfig\n"
        "CONFIG = RunConfig(name='own', schemes=('int2_g16', 'int4_g16', 'int8_channel'), metrics=('fisher',),\n"
        "    allocate_by='fisher', budgets=('5bpw',), hand_out='5bpw', window=32, calibration_windows=9,\n"
        "    batch_size=4, selection_windows=8, test_windows=8)\n"
    )
    job = ["run", "config.py", "--model", "model", "--data", "calibration.txt", "--set", "seed=3", "--out", "runs"]
    code, body, _ = mpq(*job, "--json")
    assert code == 0
    evaluate_keys = set(mpq("evaluate", "model", "--data", "test.txt", "--reference", "model", *WINDOW, "--json")[1])
    rows = [*body["plans"].values(), *body["uniform"].values()]
    assert len(rows) == 2 * (1 + 3)
    assert all(set(row) == evaluate_keys for row in rows)
    folder = place / body["run"]
    record = json.loads((folder / "record.json").read_text())
    assert {name.partition("-")[0] for name in body["heuristic"]} == {"heuristic"}
    assert (record["config"]["seed"], record["config"]["model"]) == (3, "model")
    written = {"frontier.png", "frontier.svg", "report.html", "plan.json", "record.json", "results.json", "quantized"}
    assert written <= {p.name for p in folder.iterdir()}
    page = (folder / "report.html").read_text()
    assert "<script src" not in page
    assert "mixed@5bpw" in page
    before = {p: p.stat().st_mtime_ns for p in (folder / "scores").iterdir()}
    assert mpq(*job)[0] == 0  # typed again: nothing is measured twice
    assert {p: p.stat().st_mtime_ns for p in (folder / "scores").iterdir()} == before
    assert mpq("evaluate", folder / "quantized", "--data", "test.txt", *WINDOW, "--json")[0] == 0
