"""Importance matrices of llama.cpp: both formats read, one written, and rounding by what they hold."""

import dataclasses
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from mpq import artifacts
from mpq.commands import make_candidates
from mpq.formats import parse_scheme
from mpq.gguf.imatrix import read_imatrix, stats_of, write_dat, write_imatrix
from mpq.models import load
from mpq.quantize import RTN
from mpq.types import LayerStats, MpqError
from tests import tiny
from tests.command import exit_code

WHAT = "an importance matrix of llama.cpp, as llama-imatrix writes it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, text, and what `mpq calibrate` makes of them."""
    root = tmp_path_factory.mktemp("imatrix")
    tiny.write_folder(root / "model", tiny.CONFIG | {"num_hidden_layers": 1})
    (root / "text.txt").write_text(tiny.text(documents=10))
    options = ("--data", root / "text.txt", "--window", 16, "--max-windows", 4, "--imatrix", root / "imatrix.gguf")
    assert exit_code("calibrate", root / "model", *options, "-o", root / "stats", "--json") == 0
    return root


@pytest.fixture(scope="module")
def weights(folder):
    return load(str(folder / "model")).trace(1, 8).weights


def by_hand(path, sums, counts):
    """A file as llama-imatrix lays it out."""
    writer = gguf.GGUFWriter(path, "x")
    writer.add_string("general.type", "imatrix")
    for name, array in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(array, np.float32))
    for name, array in counts.items():
        writer.add_tensor(f"{name}.counts", np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestReading:
    def test_sums_are_divided_by_counts_and_experts_that_saw_nothing_have_ones(self, tmp_path):
        sums = {"blk.0.attn_q.weight": [[2.0, 4.0, 8.0]], "blk.0.ffn_up_exps.weight": [[3.0, 6.0], [0.0, 0.0]]}
        counts = {"blk.0.attn_q.weight": [[4.0]], "blk.0.ffn_up_exps.weight": [[3.0], [0.0]]}
        found = read_imatrix(by_hand(tmp_path / "x.gguf", sums, counts))
        np.testing.assert_array_equal(found["blk.0.attn_q.weight"], [0.5, 1.0, 2.0])
        np.testing.assert_array_equal(found["blk.0.ffn_up_exps.weight"], [1.0, 2.0, 1.0, 1.0])

    def test_the_older_format_holds_means_times_calls(self, tmp_path):
        name = b"blk.0.attn_q.weight"
        body = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii2f", 4, 2, 2.0, 8.0)
        for tail in (b"", struct.pack("<ii", 4, 3) + b"txt"):  # what follows the entries may be missing
            (tmp_path / "x.dat").write_bytes(body + tail)
            np.testing.assert_array_equal(read_imatrix(tmp_path / "x.dat")[name.decode()], [0.5, 2.0])

    def test_what_is_written_in_the_older_format_is_read_again(self, tmp_path):
        values = {"a": np.float32([1, 2, 3]), "output.weight": np.float32([0.5])}
        write_dat(tmp_path / "x.dat", values, "text")
        found = read_imatrix(tmp_path / "x.dat")
        assert found.keys() == values.keys()
        for name, array in values.items():
            np.testing.assert_array_equal(found[name], array)


class TestWriting:
    def test_the_command_writes_the_diagonals_of_its_grams(self, folder, weights):
        grams, _ = artifacts.load_stats(folder / "stats", load(str(folder / "model")).digest)
        file = gguf.GGUFReader(folder / "imatrix.gguf")
        assert file.fields["general.type"].contents() == "imatrix"
        assert file.fields["imatrix.datasets"].contents() == [str(folder / "text.txt")]
        assert {"imatrix.chunk_count", "imatrix.chunk_size"} <= file.fields.keys()
        tensors = {t.name: t.data for t in file.tensors}
        found = read_imatrix(folder / "imatrix.gguf")
        assert set(found) == {f"blk.0.{p}.weight" for p in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
                                                            "ffn_up", "ffn_down")}  # fmt: skip
        want = np.diagonal(grams["layers.0.mlp.down_proj.kernel"].gram[0])
        np.testing.assert_allclose(found["blk.0.ffn_down.weight"], want, rtol=1e-6)
        tokens = grams["layers.0.mlp.down_proj.kernel"].num_tokens
        assert tensors["blk.0.ffn_down.weight.counts"].tolist() == [[tokens]]
        np.testing.assert_allclose(tensors["blk.0.ffn_down.weight.in_sum2"][0], want * tokens, rtol=1e-6)

    def test_there_is_none_of_activations(self, folder, capsys):
        options = ("--of", "activations", "--imatrix", folder / "other.gguf", "-o", folder / "ranges")
        assert exit_code("calibrate", folder / "model", "--data", folder / "text.txt", *options) == 2
        message = "an importance matrix is of weights: leave --imatrix out with --of activations"
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (folder / "other.gguf").exists()

    def test_scoring_takes_it_for_statistics(self, folder):
        data = ("--data", folder / "text.txt", "--window", 16, "--metric", "weight_mse", "--schemes", "int4_g16")
        options = ("--stats", folder / "imatrix.gguf", "--method", "gptq", "-o", folder / "table", "--json")
        assert exit_code("sensitivity", folder / "model", *data, *options) == 0

    def test_rounding_takes_it_for_statistics(self, folder):
        model, scheme = load(str(folder / "model")), parse_scheme("q4_0")
        made = make_candidates(model, model.trace(1, 8), "gptq", None, folder / "imatrix.gguf", 1)
        spec = next(w for w in model.trace(1, 8).weights if "down_proj" in w.path)
        importance = read_imatrix(folder / "imatrix.gguf")["blk.0.ffn_down.weight"]
        want = RTN("mse")(spec.read(model.params), scheme, jnp.diag(jnp.asarray(importance))[None])
        np.testing.assert_array_equal(made.dequantized(spec, scheme), want.dequantize())

    def test_a_stack_of_experts_has_a_row_each(self, weights, tmp_path):
        spec = dataclasses.replace(weights[1], path="layers.0.mlp.experts.up_proj.kernel", batch=2, k=2)
        gram = np.float32([[[1, 9], [9, 2]], [[3, 9], [9, 4]]])
        write_imatrix(tmp_path / "x.gguf", [spec], {spec.path: LayerStats(gram, gram[:, 0], 5)}, "text")
        np.testing.assert_allclose(read_imatrix(tmp_path / "x.gguf")["blk.0.ffn_up_exps.weight"], [1, 2, 3, 4])
        back = stats_of(tmp_path / "x.gguf", [spec])[spec.path].gram
        np.testing.assert_allclose(back, [[[1, 0], [0, 2]], [[3, 0], [0, 4]]])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("sums", "counts", "message"),
        [
            ({}, {"a": [[1.0]]}, f"is not {WHAT}: it lacks sums or counts"),
            ({"a": [[1.0, 1.0]]}, {}, f"is not {WHAT}: it lacks sums or counts"),
            ({"a": [[1.0], [1.0], [1.0]]}, {"a": [[1.0], [1.0]]}, "has 2 counts for 3 sums of a: it is damaged"),
            ({"a": [[-1.0]]}, {"a": [[1.0]]}, "has importances of a that are negative or not finite: "
             "collect them again"),
        ],
    )  # fmt: skip
    def test_gguf_files(self, sums, counts, message, tmp_path):
        path = by_hand(tmp_path / "x.gguf", sums, counts)
        with pytest.raises(MpqError) as raised:
            read_imatrix(path)
        assert str(raised.value) == f"{path} {message}"

    def test_older_files(self, tmp_path):
        path, good = tmp_path / "x.dat", tmp_path / "good.dat"
        with pytest.raises(MpqError) as raised:
            read_imatrix(path)
        assert str(raised.value) == (f"cannot read {path}: No such file or directory; it should be {WHAT}")
        write_dat(good, {"name": np.ones(5, np.float32)}, "text")
        entries = 4 + 4 + 4 + 8 + 20  # the tail behind them may be missing
        for cut in range(entries):
            path.write_bytes(good.read_bytes()[:cut])
            with pytest.raises(MpqError, match=r"x\.dat is truncated, or not an imp.*: collect it again$"):
                read_imatrix(path)
        path.write_bytes(struct.pack("<i", 0))
        with pytest.raises(MpqError, match="it has no entries"):
            read_imatrix(path)

    def test_another_model(self, folder, weights, tmp_path):
        write_dat(tmp_path / "x.dat", {"blk.0.attn_q.weight": np.ones(5, np.float32)}, "text")
        with pytest.raises(MpqError) as raised:
            stats_of(tmp_path / "x.dat", weights)
        assert str(raised.value) == (
            f"{tmp_path / 'x.dat'} has 5 importances for weight layers.0.self_attn.q_proj.kernel, which has 32 inputs: "
            "it is of another model"
        )
        write_dat(tmp_path / "x.dat", {"a": np.ones(5, np.float32)}, "text")
        with pytest.raises(MpqError) as raised:
            stats_of(tmp_path / "x.dat", weights)
        assert (
            str(raised.value) == f"{tmp_path / 'x.dat'} has no entry for any weight of this model: it is of another one"
        )
