"""Orbax folders: every byte accounted for, every bit back, and nothing half written."""

import errno
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import PyTreeCheckpointer

from mpq import files
from mpq.export import EXPORTERS, orbax
from mpq.formats import parse_scheme
from mpq.quantize import apply_plan
from mpq.quantize.rtn import RTN
from mpq.types import MpqError, Use, WeightSpec

# Odd shapes; k is no multiple of most groups, and no stream of codes ends on a byte by luck alone.
SCHEMES = ("int2_g16", "int3_g16_zp", "int4_g64", "int5_channel_zp", "int6_g7", "int7_channel", "int8_g32_zp_sfloat32")
SCHEMES += ("nf3_g16", "fp4_g16", "fp8_e4m3_channel", "fp8_e5m2_g5", "nf4_g16", "bf16", "fp16", "fp32")
SCHEMES += ("fp4_g16_sfp8", "int3_g16_zp_sfp8", "fp4_g32_se8m0", "int4_g16_sbfloat16", "int5_tensor_zp")
SCHEMES += ("lut2_g16", "tcq3_g16")
K, N = 37, 11
PLAN = {"name": "mixed", "choices": {"layers.0": "int4_g64"}, "bits_per_weight": 4.25}
CONFIG = {"model_type": "llama", "hidden_size": 37}


def spec(path, param, index=(), shape=(K, N), permutation=(0, 1), batch=1, k=K, n=N):
    uses = (Use("matmul", "x", k * n * batch), Use("embedding", "tokens", 0))
    return WeightSpec(path, param, index, shape, permutation, batch, k, n, path, uses)


@pytest.fixture(scope="module")
def model():
    """Arguments of `save`: every scheme, a transposed weight, experts, slices of a scanned array, odd names."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    params = {f"layers.{i}/kernel%": draw(K, N) for i in range(len(SCHEMES))}
    weights = [spec(path, path) for path in params]
    choice = dict(zip(params, SCHEMES, strict=True))
    params |= {"embed": draw(N, K), "experts": draw(3, K, N), "stack": draw(2, K, N), "half": draw(2, K, N)}
    weights += [
        spec("embed", "embed", shape=(N, K), permutation=(1, 0)),
        spec("experts", "experts", shape=(3, K, N), permutation=(0, 1, 2), batch=3),
        *(spec(f"stack[{i}]", "stack", (i,)) for i in range(2)),
        spec("half[1]", "half", (1,)),  # the other slice is no weight: the whole array is kept beside it
    ]
    choice |= {"embed": "int4_g16", "experts": "int3_g16_zp", "stack[0]": "int2_g16", "stack[1]": "bf16"}
    choice |= {"half[1]": "int8_channel"}
    params |= {"experts_nvfp4": draw(3, K, N), "experts_tensor": draw(3, K, N), "experts_lut": draw(3, K, N)}
    for path, text in (("experts_nvfp4", "nvfp4"), ("experts_tensor", "int3_tensor_zp"), ("experts_lut", "lut2_g16")):
        weights.append(spec(path, path, shape=(3, K, N), permutation=(0, 1, 2), batch=3))
        choice[path] = text
    params |= {
        "norm": draw(K).astype(jnp.bfloat16).astype(jnp.float32),
        "bias": draw(5),
        "zeros": jnp.zeros((4, 4)),  # a store that leaves out fill values would write nothing
        "scalar": jnp.float32(1.5),
        "empty": jnp.zeros((0, 3)),
        "steps": jnp.arange(3, dtype=jnp.int32),
    }
    qtensors = {w.path: RTN()(w.to_matrix(params[w.param]), parse_scheme(choice[w.path])) for w in weights}
    return {
        "params": params,
        "stored": {"norm": "bfloat16", "half": "float16"},
        "weights": tuple(weights),
        "qtensors": qtensors,
        "plan_json": PLAN,
        "config": CONFIG,
        "tokenizer_json": '{"é": "\\r\\n"}\r\n',
    }


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "quantized"
    orbax.save(path, **model)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def unquantized_bytes(model):
    """Everything but `half` is stored under its own dtype; norm and half in two bytes."""
    whole = ("bias", "zeros", "scalar", "steps")
    return sum(model["params"][name].nbytes for name in whole) + 2 * K + 2 * model["params"]["half"].size


def test_the_table_of_exporters():
    assert EXPORTERS["orbax"] is orbax


def test_payload_on_disk_is_the_schemes_size_to_the_byte(model, folder):
    expected = sum(w.size_bits(model["qtensors"][w.path].scheme) for w in model["weights"])
    assert expected % 8 == 0
    data = 0  # counted with no help of the module: every file under arrays/NAME that does not begin with a dot
    for root, _, names in os.walk(folder / "arrays"):
        if root != str(folder / "arrays"):
            data += sum(os.path.getsize(os.path.join(root, name)) for name in names if not name.startswith("."))
    assert data == expected // 8 + unquantized_bytes(model)
    assert orbax.payload_bytes(folder) == data


def test_save_returns_the_payload_and_nothing_is_logged(model, tmp_path, caplog):
    assert orbax.save(tmp_path / "out", **model) == orbax.payload_bytes(tmp_path / "out")
    orbax.load(tmp_path / "out")
    assert not caplog.records
    assert not logging.getLogger("absl").disabled


def test_every_array_is_one_chunk_and_not_compressed(folder):
    described = sorted((folder / "arrays").glob("*/.zarray"))
    assert len(described) == len(json.loads((folder / "mpq.json").read_text())["arrays"])
    for file in described:
        body = json.loads(file.read_text())
        assert body["compressor"] is None
        assert body["chunks"] == body["shape"]


def test_everything_comes_back_bit_for_bit(model, folder):
    got = orbax.load(folder)
    assert got.plan == PLAN
    assert got.config == CONFIG
    assert got.tokenizer_json == model["tokenizer_json"]
    assert got.weights == model["weights"]
    assert list(got.qtensors) == [w.path for w in model["weights"]]
    for path, expected in model["qtensors"].items():
        assert got.qtensors[path].scheme == expected.scheme
        for a, b in zip(jax.tree.leaves(got.qtensors[path]), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_dequantized_is_the_plan_applied_to_the_model(model, folder):
    got = orbax.load(folder).dequantized()
    params = model["params"] | {"half": model["params"]["half"].astype(jnp.float16).astype(jnp.float32)}
    expected = apply_plan(params, model["weights"], model["qtensors"])
    assert sorted(got) == sorted(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name])


def test_orbax_itself_reads_the_arrays(model, folder):
    tree = PyTreeCheckpointer().restore((folder / "arrays").absolute())
    np.testing.assert_array_equal(tree["params"]["bias"], model["params"]["bias"])
    np.testing.assert_array_equal(tree["quantized"]["experts"]["scale"], model["qtensors"]["experts"].scale)


def test_without_tokenizer_and_without_weights(model, tmp_path):
    only = {"params": {"bias": model["params"]["bias"]}, "stored": {}, "weights": (), "qtensors": {}}
    written = orbax.save(tmp_path / "out", **only, plan_json={}, config={}, tokenizer_json=None)
    assert written == 5 * 4
    got = orbax.load(tmp_path / "out")
    assert got.tokenizer_json is None
    np.testing.assert_array_equal(got.dequantized()["bias"], model["params"]["bias"])


def test_the_same_content_gives_the_same_bytes(model, folder, tmp_path):
    orbax.save(tmp_path / "elsewhere", **model)
    contents = lambda top: {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
    assert contents(tmp_path / "elsewhere") == contents(folder)


def test_an_export_replaces_an_earlier_one_as_a_whole(model, tmp_path):
    orbax.save(tmp_path / "out", **model)
    orbax.save(tmp_path / "out", **{**model, "tokenizer_json": None})
    assert orbax.load(tmp_path / "out").tokenizer_json is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_weight_without_a_quantized_value_is_refused(model, tmp_path):
    fewer = {path: q for path, q in model["qtensors"].items() if path != "embed"}
    with pytest.raises(MpqError, match="weight embed has no quantized value"):
        orbax.save(tmp_path / "out", **{**model, "qtensors": fewer})
    assert not any(tmp_path.iterdir())


def test_a_quantized_value_of_another_shape_is_refused(model, tmp_path):
    swapped = {**model["qtensors"], "embed": model["qtensors"]["experts"]}
    with pytest.raises(MpqError, match=r"quantized weight embed is \[3, 37, 11\], not \[1, 37, 11\]"):
        orbax.save(tmp_path / "out", **{**model, "qtensors": swapped})
    assert not any(tmp_path.iterdir())


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(MpqError, match="the disk is full"):
        orbax.save(tmp_path / "out", **model)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_while_arrays_are_written_leaves_nothing_behind(model, tmp_path, monkeypatch):
    # TensorStore's report of a full tmpfs, raised by Orbax as a ValueError.
    text = (
        "RESOURCE_EXHAUSTED: Error writing local file 'a/0': Failed to write 287008 bytes to file 14: No space left on"
    )
    monkeypatch.setattr(PyTreeCheckpointer, "save", lambda *_: (_ for _ in ()).throw(ValueError(text)))
    with pytest.raises(MpqError, match="the disk is full"):
        orbax.save(tmp_path / "out", **model)
    assert not any(tmp_path.iterdir())


def test_another_error_of_the_writer_is_not_called_a_full_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(PyTreeCheckpointer, "save", lambda *_: (_ for _ in ()).throw(ValueError("odd")))
    with pytest.raises(ValueError, match=r"^odd$"):
        orbax.save(tmp_path / "out", **model)
    assert not any(tmp_path.iterdir())


def test_an_interrupt_leaves_the_earlier_folder(model, copied, monkeypatch):
    monkeypatch.setattr(orbax, "_write_arrays", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        orbax.save(copied, **{**model, "tokenizer_json": None})
    assert orbax.load(copied).tokenizer_json == model["tokenizer_json"]
    assert [p.name for p in copied.parent.iterdir()] == ["copy"]


class TestDamage:
    """Each damage is one sentence that names the part."""

    def chunk(self, folder, name="quantized.embed.qvalue"):
        return next(p for p in (folder / "arrays" / name).iterdir() if not p.name.startswith("."))

    def manifest(self, folder, change):
        body = json.loads((folder / "mpq.json").read_text())
        change(body)
        (folder / "mpq.json").write_text(json.dumps(body))

    def test_no_folder(self, tmp_path):
        with pytest.raises(MpqError, match="it does not exist; it should be the manifest of a quantized model"):
            orbax.load(tmp_path / "nothing")

    def test_a_foreign_folder(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(MpqError, match=r"cannot read .*mpq\.json"):
            orbax.load(tmp_path)

    def test_a_truncated_manifest(self, copied):
        text = (copied / "mpq.json").read_text()
        (copied / "mpq.json").write_text(text[: len(text) // 2])
        with pytest.raises(MpqError, match=r"mpq\.json ends too early"):
            orbax.load(copied)

    def test_a_manifest_of_another_version(self, copied):
        self.manifest(copied, lambda body: body.update(schema=99))
        with pytest.raises(MpqError, match="has schema 99, not 1"):
            orbax.load(copied)

    @pytest.mark.parametrize("part", ["weights", "arrays", "plan", "params"])
    def test_a_manifest_without_a_part(self, copied, part):
        self.manifest(copied, lambda body: body.pop(part))
        with pytest.raises(MpqError, match=f"lacks or misplaces '{part}'"):
            orbax.load(copied)

    def test_a_manifest_with_an_unknown_field(self, copied):
        self.manifest(copied, lambda body: body["weights"][0].update(colour="red"))
        with pytest.raises(MpqError, match="colour"):
            orbax.load(copied)

    def test_a_truncated_array(self, copied):
        chunk = self.chunk(copied)
        chunk.write_bytes(chunk.read_bytes()[:-1])
        with pytest.raises(MpqError, match=r"quantized\.embed\.qvalue holds \d+ bytes of data, not \d+: truncated"):
            orbax.load(copied)

    def test_a_missing_array(self, copied):
        shutil.rmtree(copied / "arrays" / "params.bias")
        with pytest.raises(MpqError, match=r"params\.bias holds 0 bytes of data, not 20"):
            orbax.load(copied)

    def test_a_flipped_bit(self, copied):
        chunk = self.chunk(copied)
        data = bytearray(chunk.read_bytes())
        data[0] ^= 1
        chunk.write_bytes(bytes(data))
        with pytest.raises(MpqError, match=r"quantized\.embed\.qvalue is not what was written"):
            orbax.load(copied)

    def test_a_missing_description_of_an_array(self, copied):
        (copied / "arrays" / "params.bias" / ".zarray").unlink()
        with pytest.raises(MpqError, match="is no readable Orbax checkpoint"):
            orbax.load(copied)

    def test_a_missing_description_of_the_tree(self, copied):
        (copied / "arrays" / "_METADATA").unlink()
        with pytest.raises(MpqError, match="is no readable Orbax checkpoint"):
            orbax.load(copied)

    def test_an_array_that_the_tree_does_not_have(self, copied):
        name = "params.bias"
        body = json.loads((copied / "arrays" / "_METADATA").read_text())
        body["tree_metadata"].pop("('params', 'bias')")
        (copied / "arrays" / "_METADATA").write_text(json.dumps(body))
        with pytest.raises(MpqError, match=f"lacks .*{name}"):
            orbax.load(copied)
