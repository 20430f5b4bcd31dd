"""`mpq gguf`: the bytes it counts, the plan it finds, that it does no harm, and what it says."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from mpq import show
from mpq.allocate import uniform
from mpq.data.sources import read_sets
from mpq.formats import parse_scheme
from mpq.gguf import reader, search
from mpq.gguf.export import in_memory, save, size_bytes
from mpq.gguf.names import gguf_name
from mpq.gguf.search import Options, Search, Target, best_file
from mpq.models import load
from mpq.store import MemoryStore
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code
from tests.gguf_cases import byte_level, quantized

# Types of whole integers share a compilation, and rows of 32 and 64 fill their blocks. 95 tokens are no whole number of
# anything: the embedding is filled up in the file.
TYPES = ("q4_0", "q5_0", "q8_0")
OPTIONS = Options(TYPES, windows=4, statistics_windows=8, window=16, selection_windows=8, test_windows=8, batch_size=4)


CONFIG = tiny.CONFIG | {"vocab_size": 267, "num_hidden_layers": 1, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    path = tiny.write_folder(root / "model", CONFIG)
    byte_level().save(str(path / "tokenizer.json"))
    (root / "text.txt").write_text(tiny.text(documents=40))
    return root


@pytest.fixture(scope="module")
def made(folder) -> Search:
    model = load(str(folder / "model"))
    sets = read_sets(model, str(folder / "text.txt"), window=16, limits=OPTIONS.limits, windows_per_document=4)
    return Search(model, sets, "tiny", OPTIONS, MemoryStore())


def test_the_problem_counts_the_bytes_of_the_file_and_fuses_nothing(made, tmp_path):
    problem, rng = made.problem, np.random.default_rng(0)
    assert len(problem.names) == len(made.traced.weights)
    for _ in range(5):
        choice = problem.by_path(rng.integers(len(TYPES), size=len(problem.names)))
        bits, _, _ = problem.evaluate(problem.by_group(choice))
        assert made.file_bytes(choice) == made.bytes_beside + bits // 8
    out = tmp_path / "x.gguf"
    assert made.write(out, choice) == out.stat().st_size == made.file_bytes(choice)


def test_in_memory_is_what_the_orbax_folder_gives(made, tmp_path):
    written = quantized(made.model, [parse_scheme("q8_0")], tmp_path / "out")
    here = in_memory(made.model, made.traced.weights, written.qtensors)
    for name, exported in (("a", written), ("b", here)):
        save(tmp_path / name, exported, "tiny")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert size_bytes(here, "tiny") == (tmp_path / "a").stat().st_size


@pytest.fixture(scope="module")
def body(folder):
    """What the command prints."""
    options = ("--types", *TYPES, "--window", 16, "--max-windows", 4, "--statistics-windows", 8, "--batch-size", 4)
    options += ("--selection-windows", 8, "--test-windows", 8, "--json")
    printed, out = io.StringIO(), folder / "best.gguf"
    with contextlib.redirect_stdout(printed):
        source = (folder / "model", "--data", folder / "text.txt", "-o", out, "--bpw", 6.5)
        assert exit_code("gguf", *source, *options) == 0
    return json.loads(printed.getvalue())


class TestTheCommand:
    def test_the_file_is_within_the_budget_and_holds_the_plan(self, body, folder, made):
        opened = reader.read(folder / "best.gguf")
        assert body["size_bytes"] == (folder / "best.gguf").stat().st_size == opened.size_bytes <= body["budget_bytes"]
        values = sum(w.size for w in made.traced.weights)
        stored = {path: opened.tensors[gguf_name(path)] for path in body["choices"]}
        assert {path: t.kind for path, t in stored.items()} == body["choices"]
        assert body["bits_per_weight"] == sum(8 * t.nbytes for t in stored.values()) / values <= 6.5
        assert len(set(body["choices"].values())) > 1

    def test_the_file_itself_is_measured(self, body, folder, made):
        read_back = load(str(folder / "best.gguf"))
        again = made.scores(read_back.params, "test").summary()
        assert body["measured"]["kl"] == pytest.approx(again.kl, rel=1e-6)
        assert body["measured"]["kl"] > 0

    def test_what_is_handed_out_is_the_best_on_the_selection_set(self, body):
        rows = {row["plan"]: row for row in body["plans"]}
        assert body["plan"] == min(rows, key=lambda name: rows[name]["selection_kl"])
        assert set(rows) == {"mpq", "Q3_K_M of llama.cpp", "all Q5_0"}
        assert all(row["file_bytes"] <= body["budget_bytes"] for row in rows.values())
        assert rows["all Q5_0"]["predicted_kl"] > rows["mpq"]["predicted_kl"] > 0

    def test_so_is_how_its_weights_are_made(self, body, folder, made):
        kl = body["ways_kl"]
        assert list(kl) == ["gptq", "gptq+propagate"]
        assert body["method"] == min(kl, key=kl.get)
        choice = {path: parse_scheme(kind.lower()) for path, kind in body["choices"].items()}
        qtensors = made.qtensors(choice, body["method"])
        other = made.qtensors(choice, next(way for way in kl if way != body["method"]))
        read_back = load(str(folder / "best.gguf")).params
        for spec in made.traced.weights:
            stored = spec.read(read_back)
            np.testing.assert_array_equal(stored, qtensors[spec.path].dequantize(), err_msg=spec.path)
        assert any(not np.array_equal(qtensors[p].dequantize(), other[p].dequantize()) for p in choice)

    def test_its_scores_are_kept_beside_the_file(self, body, folder):
        assert list((folder / "scores").rglob("*"))

    def test_a_person_sees_plans_and_what_was_measured(self, body):
        console = Console(width=120, file=io.StringIO())
        show.gguf(body, console)
        said = console.file.getvalue()
        for row in body["plans"]:
            assert f"{row['file_bytes']:,}" in said
        written = f"{body['size_bytes']:,} bytes, {body['bits_per_weight']:.3f} bits per weight; read back"
        assert written in " ".join(said.split())
        assert "rounded alike, has KL" in said
        assert f"KL of {body['plan']} on the selection set by how its weights are made: gptq " in said


def test_a_bad_solution_is_not_handed_out(made, tmp_path, monkeypatch):
    """The knapsack is made to give the smallest type to everything: the mix, which takes more bytes, must win."""

    class Worst:
        def at(self, bits):
            return uniform(made.problem, "q4_0", bits)

    monkeypatch.setattr(search, "solve_frontier", lambda _: Worst())
    body = best_file(made, Target(like="Q5_K_M"), tmp_path / "x.gguf")
    assert body["plan"] == "Q5_K_M of llama.cpp"
    assert body["size_bytes"] == body["budget_bytes"] == made.file_bytes(made.mix("Q5_K_M"))
    assert body["plans"][0]["selection_kl"] > body["plans"][1]["selection_kl"]
    assert "rival" not in body


def test_a_search_on_measured_plans_is_never_worse_where_it_searches(made, tmp_path):
    more = dataclasses.replace(made, options=dataclasses.replace(OPTIONS, refine_rounds=1))
    plans = more.plans(more.budget_bytes(Target(bpw=6.0)))
    loss = more._plan_loss
    assert loss(plans["mpq, searched on"]) <= loss(plans["mpq"])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("target", "given"),
        [({}, "none"), ({"size": "1MB", "bpw": 3.0}, "size, bpw"), ({"like": "x", "bpw": 3.0}, "bpw, like")],
    )
    def test_other_than_one_target(self, target, given):
        with pytest.raises(MpqError) as raised:
            Target(**target)
        assert str(raised.value) == f"give exactly one of --size, --bpw and --like (given: {given})"

    def test_a_target_below_the_smallest_file(self, made):
        with pytest.raises(MpqError) as raised:
            made.budget_bytes(Target(size="10kB"))
        smallest = made.file_bytes({w.path: parse_scheme("q4_0") for w in made.traced.weights})
        assert str(raised.value) == (
            f"the target of 10,000 bytes is below the smallest file of this model, {smallest:,} bytes (llama.cpp's "
            f"Q2_K: {made.file_bytes(made.mix('Q2_K')):,}): ask for more, or allow smaller types"
        )

    def test_types_that_are_none_of_ggml_or_fit_nothing(self, made):
        other = dataclasses.replace(made, options=dataclasses.replace(OPTIONS, types=("int4_g32",)))
        with pytest.raises(MpqError, match=r"^type 'int4_g32' is none of ggml: allowed are q8_0, .*, f16 and bf16$"):
            _ = other.types
        large = dataclasses.replace(made, options=dataclasses.replace(OPTIONS, types=("q4_k",)))
        with pytest.raises(MpqError) as raised:
            large.budget_bytes(Target(bpw=5.0))
        assert str(raised.value) == "a weight has rows of 32, which fill the blocks of none of q4_k: add f16"

    def test_a_model_without_a_place_in_gguf(self, tmp_path, capsys):
        config = tiny.CONFIG | {"hidden_act": "gelu"}
        path = tiny.write_folder(tmp_path / "model", config)
        (tmp_path / "text.txt").write_text(tiny.text())
        assert exit_code("gguf", path, "--data", tmp_path / "text.txt", "--bpw", 5, "-o", tmp_path / "x.gguf") == 2
        assert "has an activation other than its own" in capsys.readouterr().err
        assert not (tmp_path / "x.gguf").exists()


def test_candidates_are_those_whose_blocks_rows_fill(made):
    usual = dataclasses.replace(made, options=dataclasses.replace(OPTIONS, types=()))
    assert tuple(map(str, usual.types)) == search.SMALL_BLOCKS
