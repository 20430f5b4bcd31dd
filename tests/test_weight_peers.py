"""`experiments.weight_peers` on a tiny model, whose peers are stood in for, and the page made of it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.weight_peers import INGREDIENTS, METHODS, best_peer, page
from experiments import end_to_end, peer_folders, weight_peer_worker, weight_peers
from experiments.weight_peer_worker import METHODS as WORKS
from experiments.weight_peers import FLOAT, PEERS, Options, by_window, refusal, size_bits
from mpq.config import load_config
from mpq.files import read_json
from mpq.types import MpqError
from tests import tiny

STAND_IN = """
import json, sys
from pathlib import Path
import numpy as np
job = json.loads(Path(sys.argv[1]).read_text())
if job["method"] == "torchao":
    sys.exit("AssertionError: 172 is no multiple of 32")
for name, file in job["texts"].items():
    tokens = np.load(file)
    np.save(Path(job["out"]) / f"{name}.npy", np.zeros((*tokens.shape, 96), np.float32))
if job["method"] == "auto_round_folder":
    Path(job["save"]).mkdir()
    (Path(job["save"]) / "a.safetensors").write_bytes(bytes(12))
elif "beside" in job:
    assert (Path(job["beside"]) / "a.safetensors").stat().st_size == 12
layers = [["model.layers.0.mlp.up_proj", 64, 32, 3, 32, 16, 0, False]]
made = {"layers": layers, "seconds": 1.5, "cpu_seconds": 1.25, "versions": {"hqq": "0.2"}, "turns": [3.0, 4.0]}
(Path(job["out"]) / "made.json").write_text(json.dumps(made))
"""
"""What a worker does, without quantizing: every token is as likely as any other."""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    (root / "worker.py").write_text(STAND_IN)
    texts = tiny.model_and_texts(root)
    return Options(
        **texts,
        python=Path(sys.executable),
        other=texts["test"],
        out=root / "tiny.json",
        peers=("HQQ W3g64", "torchao W3g32"),
        ingredients=("uniform",),
        budgets=(3.5,),
        windows=8,
        window=16,
        batch_size=4,
        steps=2,
    )


@pytest.fixture(scope="module")
def folders(options):
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(weight_peers.Texts)}
    out = options.out.with_name("folders.json")
    asked = peer_folders.Options(**shared | {"out": out, "cases": ("AutoRound W4g32",), "methods": ("rtn",)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_peers, "WORKER", options.out.with_name("worker.py"))
        peer_folders.main(asked)
        first = read_json(out, "results")
        peer_folders.main(dataclasses.replace(asked, methods=("rtn", "guided", "distilled")))
    found = read_json(out, "results")
    assert found["rows"][:2] == first["rows"]  # not computed again
    return found


@pytest.fixture(scope="module")
def result(options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_peers, "WORKER", options.out.with_name("worker.py"))
        weight_peers.main(dataclasses.replace(options, ingredients=()))
        first = read_json(options.out, "results")
        weight_peers.main(options)
    result = read_json(options.out, "results")
    assert result["rows"][:2] == first["rows"]  # not computed again
    return result


def test_peers_and_ours_are_judged_alike(result):
    peer, refused, ours = result["rows"]
    assert peer["by"] == "peer"
    # Equal likelihoods: the loss is log(96) on any text.
    assert np.log(result["perplexity"]["test"]) + peer["test"]["excess"] == pytest.approx(np.log(96), abs=1e-5)
    assert peer["test"] == peer["other"]
    assert refused == {"by": "peer", "name": "torchao W3g32", "refused": "AssertionError: 172 is no multiple of 32"}
    assert ours["name"] == "uniform 3.5"
    assert 0 < ours["bits_per_weight"] <= 3.5
    assert 0 < ours["test"]["kl"] == ours["other"]["kl"]


def test_the_page_tells_of_every_row(result):
    text = page([result])
    peer = result["rows"][0] | {"bits_per_weight": 3.5}
    assert "| HQQ W3g64 | " in text
    assert "- torchao W3g32: `AssertionError: 172 is no multiple of 32`" in text
    assert f"| {INGREDIENTS['uniform']}, 3.5 | " in text
    assert "at most half" in text
    assert "Not run: AutoRound W2g32, AutoRound W3g32, AutoRound W4g32; " in text
    assert "hqq 0.2" in text
    assert "in the 16 bits that they had, for their shape: HQQ W3g64.\n" in text
    assert "16 bits that they had" not in page([result | {"rows": [peer]}])
    assert best_peer(result, 3.5) is None  # what it left as it was counts 16 bits
    assert best_peer(result | {"rows": [peer]}, 3.49) == peer  # within a hundredth
    assert best_peer(result | {"rows": [peer]}, 3.4) is None
    ours = result["rows"][2]
    half = ours["test"] | {"excess": peer["test"]["excess"] / 2}
    for excess, word in ((1.0, "| yes |"), (1.01, "| **no** |")):
        row = ours | {"test": half | {"excess": excess * half["excess"]}}
        assert word in page([result | {"rows": [peer, row]}])
        assert word not in (small := page([result | {"rows": [peer | {"bits_per_weight": 3.3}, row]}]))
        assert "| no peer of this size |" in small


def test_files_of_one_model_are_one_table(result):
    halves = [result | {"rows": part} for part in (result["rows"][:1], result["rows"][1:])]
    assert page(halves) == page([result])


def test_the_page_tells_of_every_folder(folders):
    text = page([folders])
    assert "| AutoRound W4g32 (`int4_g32`) | its own quantizer | 12 |" in text
    for row in folders["rows"]:
        assert f"| {METHODS[row['method']].format(2)} | {row['bytes']:,} | " in text
    assert " | 1.00 |  | " in text  # theirs over theirs, which is no change
    assert text.count(" | 0.75 |") == 3  # the times of ours


def test_folders_are_made_and_judged(folders):
    rows = {row["method"]: row for row in folders["rows"]}
    assert list(rows) == ["theirs", "rtn", "guided", "distilled"]
    assert {row["scheme"] for row in rows.values()} == {"int4_g32"}
    assert rows["theirs"]["bytes"] == 12  # what the stand-in writes
    assert rows["rtn"]["bytes"] == rows["guided"]["bytes"] == rows["distilled"]["bytes"] > 10_000
    assert all(row["test"]["kl"] > 0 for row in rows.values())
    assert rows["rtn"]["time_ratio"] == 0.75  # of what the stand-in says
    assert "time_ratio" not in rows["theirs"]
    # Both have the logits of the stand-in: on each window ours changes nothing.
    assert rows["rtn"]["test"]["kl_change"] == rows["distilled"]["other"]["kl_change_stderr"] == 0
    options = Options("m", *map(Path, "pdtoo"))
    for part, message in (("cases", "unknown case 'W1': "), ("methods", "unknown method 'W1': ")):
        asked = peer_folders.Options(*dataclasses.astuple(options)[:6], **{part: ("W1",)})
        with pytest.raises(MpqError, match=rf"^{message}the valid ones are "):
            peer_folders.main(asked)


def test_bits_count_scales_zero_points_and_what_was_left():
    row = ["a", 4, 172, 3, 32, 16, 3, False]  # 6 groups a row, the last of 12 values
    assert size_bits([row], 4 * 172) == 4 * 172 * 3 + 4 * 6 * (16 + 3)
    flat = ["a", 4, 172, 4, 64, 8.125, 0, True]  # 11 groups in all: 688 / 64 = 10.75
    assert size_bits([flat], 4 * 172 + 10) == 4 * 172 * 4 + 11 * 8.125 + 10 * 16
    with pytest.raises(MpqError, match=r"^the layers of a peer hold 688 values, of 687 that are counted: give the "):
        size_bits([flat], 687)


def test_logits_are_found_by_their_window(tmp_path):
    texts = []
    for name, first in (("a", 0), ("b", 100)):
        tokens = np.arange(first, first + 12, dtype=np.int32).reshape(3, 4)
        np.save(tmp_path / f"{name}.npy", tokens[..., None] * np.ones(5, np.float32))
        texts.append((tokens, tmp_path / f"{name}.npy"))
    windows = np.stack([texts[1][0][2], texts[0][0][1]]).astype(np.int64)
    np.testing.assert_array_equal(by_window(texts)(windows), windows[..., None] * np.ones(5))


def test_a_worker_says_why_it_failed():
    assert refusal("Traceback\nValueError: no\n\n", Path("python"), "hqq") == "ValueError: no"
    assert refusal("", Path("python"), "hqq") == "nothing was printed"
    wanted = r"^env/python cannot run hqq \(ModuleNotFoundError: No module named 'hqq'\): give an "
    with pytest.raises(MpqError, match=wanted):
        refusal("Traceback\nModuleNotFoundError: No module named 'hqq'", Path("env/python"), "hqq")


def test_checkpoints_are_timed_in_turns(monkeypatch, tmp_path):
    ran, ticks = [], iter(range(100))
    monkeypatch.setattr(weight_peer_worker.time, "perf_counter", lambda: next(ticks) ** 2)
    models = [lambda batch, name=name: ran.append((name, batch)) for name in "ab"]
    # The n-th run takes (2 n + 1)^2 - (2 n)^2 = 4 n + 1, and the middle one of 21 rounds is the eleventh.
    assert weight_peer_worker.in_turns(models, 7) == [4 * 20 + 1, 4 * 21 + 1]
    assert ran == [("a", 7), ("b", 7)] * weight_peer_worker.REPEATS
    (tmp_path / "below").mkdir()
    (tmp_path / "below/config.json").write_text("{}")
    assert weight_peer_worker.checkpoint(str(tmp_path)) == str(tmp_path / "below")


def test_every_setting_has_a_method():
    assert {peer.method for peer in PEERS.values()} <= set(WORKS)
    assert PEERS[FLOAT].method == "nothing"
    with pytest.raises(MpqError, match=r"^unknown peer 'W1': the valid ones are PyTorch, float32, AutoRound W2g32, "):
        weight_peers.main(Options("m", *map(Path, "pdtoo"), peers=("W1",)))


def test_the_time_of_a_run_has_its_parts(tmp_path, monkeypatch):
    asked = []

    def run(config, overrides, root):
        asked.extend(overrides)
        jax.jit(lambda x: x + len(asked))(jnp.zeros(3))  # something is compiled
        (root / "costs.json").write_text('{"seconds": {"stats": 1.25}}')
        return {"run": str(root), "plans": {"mixed": {"kl": 0.5}}}

    monkeypatch.setattr(end_to_end, "run", run)
    options = end_to_end.Options("reference", "reference", tmp_path / "times.json", budget="3.0bpw")
    end_to_end.main(options)
    end_to_end.main(options)  # in the place of the first
    (row,) = read_json(options.out, "results")["rows"]
    assert row["model"] == "reference"
    assert row["stages"] == {"stats": 1.25}
    assert row["plans"] == {"mixed": {"kl": 0.5}}
    assert 0 < row["traced"] + row["lowered"] + row["compiled"] < row["seconds"]
    config = load_config(str(end_to_end.CONFIG), asked[: len(asked) // 2])
    assert (config.metrics, config.compare_methods, config.budgets) == (("fisher",), (), ("3.0bpw",))
    assert dict(config.sensitivity_windows) == {"fisher": 16}
    read = page([read_json(options.out, "results")])
    assert "| reference | 3.0bpw | " in read
