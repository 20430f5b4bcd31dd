"""Checkpoint folders of quantized models: written, read back bit for bit, sized to the byte, or refused."""

import dataclasses
import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpq import artifacts
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.hf import export as hf
from mpq.hf.containers import CONTAINERS
from mpq.hf.load import load_codes
from mpq.models import load
from mpq.quantize import RTN, Candidates
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code, finished_bars

CONFIG = tiny.CONFIG | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
MIXED = ("int4_g16", "int8_channel", "int3_g8_zp", "int2_g16", "int5_channel_zp", "int6_tensor", "bf16", "fp32")
PLANS = {
    "hf": MIXED,
    "gptq": ("int4_g16_zp",),
    "gptq_v2": ("int2_g32", "fp16"),
    "awq": ("int4_g16_zp", "bf16"),
    "bnb": ("nf4_g32_sfloat32",),
    "llm_int8": ("int8_channel",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(tiny.write_folder(tmp_path_factory.mktemp("hf") / "model", CONFIG)))


@pytest.fixture(scope="module")
def weights(model):
    return model.trace(1, 16).weights


@pytest.fixture(scope="module")
def candidates(model, weights):
    return Candidates(model.params, weights, RTN())


@pytest.fixture(scope="module")
def quantized(model, weights, candidates, tmp_path_factory):
    """Target -> an Orbax folder of a plan that it can express."""
    folders = {}
    for name, schemes in PLANS.items():
        choice = {w.path: parse_scheme(schemes[i % len(schemes)]) for i, w in enumerate(weights)}
        floats = ("embed_tokens.embedding",) if name == "hf" else ("embed_tokens.embedding", "lm_head.kernel")
        choice |= dict.fromkeys(floats, parse_scheme("fp32" if name in ("bnb", "llm_int8") else "fp16"))
        choice |= {"lm_head.kernel": parse_scheme("int4_g16")} if name == "hf" else {}
        plan = artifacts.make_plan(name, choice, None, weights, 0, model.digest)
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        orbax.save(folders[name], **export_arguments(model, weights, candidates.choose(choice), plan))
    return folders


@pytest.fixture
def exported(quantized) -> Exported:
    return orbax.load(quantized["hf"])


def assert_same(a: Exported, b: Exported) -> None:
    assert a.qtensors.keys() == b.qtensors.keys()
    for path, q in a.qtensors.items():
        other = b.qtensors[path]
        assert str(q.scheme) == str(other.scheme), path
        for name in ("qvalue", "scale", "zero_point"):
            x, y = getattr(q, name), getattr(other, name)
            assert (x is None) == (y is None), path
            assert x is None or x.dtype == y.dtype, path
            assert x is None or bool(jnp.array_equal(x, y)), (path, name)
    for path, value in a.params.items():
        np.testing.assert_array_equal(value, b.params[path], err_msg=path)
        assert value.dtype == b.params[path].dtype


@pytest.mark.parametrize("name", PLANS)
def test_the_folder_is_read_back_bit_for_bit(quantized, tmp_path, capsys, name):
    out = tmp_path / "folder"
    assert exit_code("export", quantized[name], "--to", name, "-o", out, "--json") == 0
    size = (out / "model.safetensors").stat().st_size
    printed = capsys.readouterr()
    assert json.loads(printed.out)["size_bytes"] == size
    assert list(finished_bars(printed.err)) == [f"export {CONTAINERS[name].name}"]
    exported = orbax.load(quantized[name])
    assert TARGETS[name].size_bytes(exported, "x") == size
    assert_same(exported, load_codes(out))
    want = exported.dequantized()
    for path, param in load(str(out)).params.items():
        np.testing.assert_array_equal(np.asarray(param), np.asarray(want[path]), err_msg=path)


def test_a_folder_that_was_exported_is_inspected_and_evaluated(quantized, model, tmp_path, capsys):
    out, text = tmp_path / "folder", tmp_path / "test.txt"
    text.write_text(tiny.text(documents=6))
    assert exit_code("export", quantized["hf"], "--to", "hf", "-o", out, "--json") == 0
    capsys.readouterr()
    assert exit_code("inspect", out, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    schemes = {path: str(q.scheme) for path, q in orbax.load(quantized["hf"]).qtensors.items()}
    floats = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    assert {w["path"]: w["stored"] for w in body["weights"]} == {p: floats.get(s, s) for p, s in schemes.items()}
    norms = 5 * 32 * 4
    assert body["size_bytes"] == norms + sum(w["size_bytes"] for w in body["weights"])
    results = {}
    for source in (out, quantized["hf"]):
        arguments = ("--data", text, "--window", "16", "--max-windows", "8", "--json")
        assert exit_code("evaluate", source, *arguments) == 0
        results[source] = json.loads(capsys.readouterr().out)
    same = ("size_bytes", "bits_per_weight")  # the plan of the test counts no norms
    values = [{key: value for key, value in r.items() if key not in same} for r in results.values()]
    assert values[0] == values[1]
    assert results[out]["size_bytes"] == body["size_bytes"]


def test_sizes_are_known_for_random_plans(model, weights, candidates, exported, tmp_path):
    rng, schemes = np.random.default_rng(0), [parse_scheme(s) for s in MIXED]
    for trial in range(9):
        choice = {w.path: schemes[rng.integers(len(schemes))] for w in weights}
        choice["embed_tokens.embedding"] = parse_scheme(("bf16", "fp16", "fp32")[trial % 3])
        plan = dataclasses.replace(exported, qtensors=candidates.choose(choice))
        predicted = hf.size_bytes(plan, CONTAINERS["hf"])
        assert hf.save(tmp_path / f"{trial}", plan, CONTAINERS["hf"]) == predicted


def test_equal_models_give_equal_bytes(exported, tmp_path):
    for name in ("a", "b"):
        hf.save(tmp_path / name, exported, CONTAINERS["hf"])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_config_names_every_module_and_keeps_the_scales_dtype(exported, tmp_path):
    hf.save(tmp_path / "out", exported, CONTAINERS["hf"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float16"
    assert "torch_dtype" not in config
    groups = config["quantization_config"]["config_groups"].values()
    assert {g["weights"]["num_bits"] for g in groups} == {2, 3, 4, 5, 6, 8}
    assert r"re:model\.embed_tokens$" in config["quantization_config"]["ignore"]
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer == {
        "bos_token": "<|bos|>",
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def changed(folder, change) -> None:
    """Rewrite the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def message_of(call) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)


class TestWhatCannotBeWritten:
    def test_a_scheme_is_named_with_its_weight_and_nothing_is_written(self, quantized, tmp_path, capsys):
        assert exit_code("export", quantized["hf"], "--to", "awq", "-o", tmp_path / "x") == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == (
            "mpq: weight layers.0.self_attn.q_proj.kernel at int8_channel has no form in awq: it takes int4 with "
            "scales of float16; choose another plan"
        )
        assert not list(tmp_path.iterdir())

    def test_what_is_there_already(self, quantized, tmp_path, capsys):
        (tmp_path / "x").mkdir()
        assert exit_code("export", quantized["hf"], "--to", "hf", "-o", tmp_path / "x") == 2
        message = f"mpq: {tmp_path / 'x'} exists already: choose another name or remove it"
        assert capsys.readouterr().err.strip() == message

    def test_a_zero_point_that_a_container_lacks(self, quantized, tmp_path):
        exported = orbax.load(quantized["gptq"])
        path = "layers.0.mlp.up_proj.kernel"
        q = exported.qtensors[path]
        least = dataclasses.replace(q, zero_point=jnp.full_like(q.zero_point, -8))
        plan = dataclasses.replace(exported, qtensors=exported.qtensors | {path: least})
        message = (
            f"weight {path} at int4_g16_zp: a zero point is the least code, which version 1 of GPTQ cannot store: use "
            "--to gptq_v2"
        )
        assert message_of(lambda: hf.save(tmp_path / "x", plan, CONTAINERS["gptq"])) == message

    def test_a_convolution(self, weights):
        use = dataclasses.replace(weights[0].uses[0], kind="conv")
        spec = dataclasses.replace(weights[0], shape=(3, 3, 8, 16), permutation=(0, 1, 2, 3), uses=(use,))
        message = "it takes linear layers and embeddings, and this is conv of 3 x 3 x 8 x 16, or one of a stack"
        assert TARGETS["hf"].refusal(spec, parse_scheme("int4_g16")) == message
        assert TARGETS["hf"].refusal(spec, parse_scheme("bf16")) is None

    def test_a_full_disk_leaves_nothing(self, exported, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(hf, "save_file", full)
        with pytest.raises(MpqError, match=r"cannot write .*/x: the disk is full"):
            hf.save(tmp_path / "x", exported, CONTAINERS["hf"])
        assert not list(tmp_path.iterdir())


class TestWhatCannotBeRead:
    @pytest.fixture
    def folder(self, exported, tmp_path):
        hf.save(tmp_path / "folder", exported, CONTAINERS["hf"])
        return tmp_path / "folder"

    def test_a_missing_part(self, folder):
        changed(folder, lambda tensors: tensors.pop("lm_head.weight_scale"))
        message = f"lm_head of {folder} is not as its config says ('lm_head.weight_scale'): damaged?"
        assert message_of(lambda: load(str(folder))) == message

    def test_a_truncated_part(self, folder):
        def cut(tensors):
            tensors["lm_head.weight_packed"] = tensors["lm_head.weight_packed"][:, :-1]

        changed(folder, cut)
        message = f"lm_head of {folder}: weight_packed [96, 3] and its scales do not hold [96, 32] codes of 4 bits"
        assert message_of(lambda: load(str(folder))) == message

    def test_no_quantized_tensor_at_all(self, folder):
        save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
        message = f"{folder} holds no quantized tensor, and its config has a quantization_config"
        assert message_of(lambda: load(str(folder))) == message

    def test_a_folder_without_codes(self, tmp_path):
        plain = tiny.write_folder(tmp_path / "plain", CONFIG)
        message = f"{plain} is no quantized checkpoint: it lacks a quantization_config or weights"
        assert message_of(lambda: load_codes(plain)) == message
