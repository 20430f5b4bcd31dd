"""The comparison with llama.cpp's quantizer: its numbers, and what its own libraries must be like."""

import ctypes
import sys
import types

import numpy as np
import pytest

from analysis import gguf as analysis_gguf
from experiments import gguf_peers, llama_cpp
from mpq.data.sources import read_sets
from mpq.gguf.search import Options, Search
from mpq.models import load
from mpq.store import MemoryStore
from mpq.types import MpqError
from tests import tiny
from tests.gguf_cases import byte_level


def test_how_much_lower_is_a_ratio_over_documents():
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 200, 40).astype(float)
    theirs = counts * rng.uniform(0.5, 1.5, 40) * 0.02
    sums = {
        "llama_cpp": theirs,
        "mix_rounded_here": 0.7 * theirs,
        "mpq_same_ends": 0.6 * theirs,
        "mpq": 0.5 * theirs * rng.uniform(0.9, 1.1, 40),
    }
    row = gguf_peers.compared(types.SimpleNamespace(counts=counts), sums, dict.fromkeys(sums, 1000))
    assert row["mix_rounded_here"] == {
        "bytes": 1000,
        "kl": pytest.approx(0.7 * theirs.sum() / counts.sum()),
        "kl_stderr": pytest.approx(0.7 * row["llama_cpp"]["kl_stderr"]),
        "lower_by_percent": pytest.approx(30.0),
        "lower_by_percent_stderr": pytest.approx(0.0, abs=1e-9),
    }
    assert row["mpq"]["lower_by_percent"] == pytest.approx(100 * (1 - sums["mpq"].sum() / theirs.sum()))
    drawn = [rng.integers(0, 40, 40) for _ in range(4000)]  # the bootstrap is the oracle of its error
    boot = np.std([100 * (1 - sums["mpq"][i].sum() / theirs[i].sum()) for i in drawn])
    assert row["mpq"]["lower_by_percent_stderr"] == pytest.approx(boot, rel=0.1)
    assert row["difference"] == pytest.approx((sums["mpq"] - theirs).sum() / counts.sum())
    assert row["intervals_apart"]
    close = sums | {"mpq": 0.99 * theirs}
    assert not gguf_peers.compared(types.SimpleNamespace(counts=counts), close, dict.fromkeys(sums, 1))[
        "intervals_apart"
    ]


def test_importances_are_mean_squares_of_inputs_by_the_names_of_llama_cpp(tmp_path):
    path = tiny.write_folder(tmp_path / "model", tiny.CONFIG | {"vocab_size": 267, "num_hidden_layers": 1})
    byte_level().save(str(path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(tiny.text(documents=20))
    how = Options(("q8_0",), windows=2, statistics_windows=4, window=16, selection_windows=2, test_windows=2)
    model = load(str(path))
    sets = read_sets(model, str(tmp_path / "text.txt"), window=16, limits=how.limits, windows_per_document=4)
    found = gguf_peers.importances(Search(model, sets, "tiny", how, MemoryStore()))
    assert set(found) == {f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
                                                              "ffn_up", "ffn_down")}  # fmt: skip
    # What attention reads is the embedding after its norm, worked out here from the tokens.
    data = sets["calibration"]
    x = np.asarray(model.params["embed_tokens.embedding"], np.float64)[data.inputs[data.mask]]
    x *= np.asarray(model.params["layers.0.input_layernorm.scale"]) / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], (x**2).mean(axis=0), rtol=1e-5)


class TestWhatIsRefused:
    def test_a_folder_without_the_library(self, tmp_path):
        with pytest.raises(MpqError) as raised:
            llama_cpp.Quantizer(tmp_path)
        assert str(raised.value) == (
            f"{tmp_path} holds no libllama: give the folder of a build of llama.cpp's shared libraries"
        )

    @pytest.mark.parametrize("good", [True, False])
    def test_a_library_of_another_layout_and_one_that_refuses(self, good, tmp_path, monkeypatch):
        class Function:
            def __init__(self, result):
                self.result = result

            def __call__(self, *_):
                return self.result

        default = llama_cpp._Quantization(ftype=7, output=good)
        functions = {"llama_model_quantize_default_params": default, "llama_log_set": None, "llama_model_quantize": 1}
        fake = types.SimpleNamespace(**{name: Function(result) for name, result in functions.items()})
        monkeypatch.setattr(ctypes, "CDLL", lambda _: fake)
        library = tmp_path / "libllama.so"
        library.touch()
        if not good:
            with pytest.raises(MpqError) as raised:
                llama_cpp.Quantizer(tmp_path)
            assert (
                str(raised.value) == f"{library} lays its parameters out otherwise than v0.5.0 does: take that version"
            )
            return
        with pytest.raises(MpqError) as raised:
            llama_cpp.Quantizer(tmp_path)(tmp_path / "a", tmp_path / "b", "Q2_K", {"x": np.ones(3)})
        assert str(raised.value) == f"llama.cpp does not quantize {tmp_path / 'a'} to Q2_K"

    def test_without_llama_cpp(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        with pytest.raises(MpqError) as raised:
            llama_cpp.LlamaCpp(tmp_path / "x.gguf", 16)
        assert str(raised.value) == "llama.cpp is run by the package xllamacpp: pip install xllamacpp"


@pytest.fixture(scope="module")
def results(root):
    return analysis_gguf.load(root)


class TestTheCommittedResults:
    def test_the_page_is_made_of_them(self, root, results):
        page = (root / analysis_gguf.FOLDER / "README.md").read_text(encoding="utf-8")
        assert page == analysis_gguf.page(results)

    def test_ours_takes_no_more_bytes_and_is_better_by_what_was_aimed_at(self, results):
        aims = {"Q2_K": 35, "Q3_K_M": 35, "Q4_K_M": 25, "Q5_K_M": 15}
        for name in ("reference", "student", "tiny1m"):
            rows = {row["mix"]: row for row in results[name]["rows"]}
            assert rows.keys() == aims.keys()
            for mix, row in rows.items():
                assert row["mpq"]["bytes"] <= row["llama_cpp"]["bytes"]
                assert row["intervals_apart"]
                assert row["mpq"]["lower_by_percent"] - 2 * row["mpq"]["lower_by_percent_stderr"] > aims[mix]
