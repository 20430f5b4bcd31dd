"""Folders of plans that round activations as well: LLM.int8 and its threshold, W8A8 of compressed-tensors."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpq import artifacts
from mpq.activations import activation_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.plans import rows_at, uniform_rows
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.hf.container import Site
from mpq.hf.containers import CONTAINERS
from mpq.hf.inputs import compressed_tensors_of, llm_int8_of
from mpq.hf.load import load_codes
from mpq.models import load
from mpq.quantize import RTN, Candidates
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code
from tests.test_hf_export import CONFIG, assert_same, message_of

W8A8 = {"o_proj": "int8_tensor", "down_proj": "int4_g16_zp", "gate_proj": "int4_g16", "up_proj": "int4_g16"}
"""End of a module's name -> scheme of its weight, in a mixed plan; int8_channel elsewhere."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(tiny.write_folder(tmp_path_factory.mktemp("inputs") / "model", CONFIG)))


@pytest.fixture(scope="module")
def weights(model):
    return model.trace(1, 16).weights


@pytest.fixture(scope="module")
def quantized(model, weights, tmp_path_factory):
    """Target -> an Orbax folder of a plan of weights alone."""
    folders, candidates = {}, Candidates(model.params, weights, RTN())
    for name, float_format in (("llm_int8", "fp32"), ("hf", "fp16")):
        choice = {}
        for spec in weights:
            scheme = W8A8.get(spec.path.split(".")[-2], "int8_channel") if name == "hf" else "int8_channel"
            plain = spec.path in ("embed_tokens.embedding", "lm_head.kernel")
            choice[spec.path] = parse_scheme(float_format if plain else scheme)
        plan = artifacts.make_plan(name, choice, None, weights, 0, model.digest)
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        orbax.save(folders[name], **export_arguments(model, weights, candidates.choose(choice), plan))
    return folders


@pytest.fixture(scope="module")
def rows(model):
    """Inputs of the linear layers, and that of the head."""
    found = activation_rows(model.trace(1, 16))
    return found[:-1], found[-1]


@pytest.fixture
def planned(quantized):
    """What makes a plan whose activations are rounded so."""

    def make(chosen: dict, name: str = "llm_int8", **options) -> Exported:
        weights = orbax.load(quantized[name])
        made = {row.path: RoundedActivation(row, parse_activation_scheme(s), **options) for row, s in chosen.items()}
        entries = {path: row.to_json() for path, row in made.items()}
        return dataclasses.replace(weights, plan=weights.plan | {"activations": entries})

    return make


class TestRoundedInputs:
    """LLM.int8 rounds the inputs of all its layers by one scheme, whose threshold the config has."""

    def test_the_threshold_is_that_of_the_plan(self, planned, rows, tmp_path):
        for scheme, threshold in (("int8_token_outlier6", 6.0), ("int8_token_outlier2.5", 2.5), ("int8_token", 0.0)):
            exported = planned(dict.fromkeys(rows[0], scheme))
            TARGETS["llm_int8"].save(tmp_path / scheme, exported, "x")
            config = json.loads((tmp_path / scheme / "config.json").read_text())
            assert config["quantization_config"]["llm_int8_threshold"] == threshold

    def test_without_activations_it_is_that_of_bitsandbytes(self, planned):
        assert llm_int8_of(planned({})).threshold == 6

    def test_the_size_counts_maxima_of_float32(self, weights):
        spec = weights[1]
        sizes = {s: TARGETS["llm_int8"].stored_bits(spec, parse_scheme(s)) for s in ("int8_channel", "bf16")}
        assert sizes == {"int8_channel": 8 * spec.size + 32 * spec.n, "bf16": 16 * spec.size}

    def test_what_is_not_rounded_there(self, planned, rows):
        inside, head = rows
        of = lambda chosen, **options: message_of(lambda: llm_int8_of(planned(chosen, **options)))
        for scheme in ("int4_token", "int8_token_asym", "int8_tensor", "int8_token_outlier6_static"):
            assert of({inside[0]: scheme}) == (
                f"{inside[0].path} at {scheme} has no form in llm_int8: inputs are rounded there as they are, by "
                "int8_token"
            )
        every = dict.fromkeys(inside, "int8_token")
        moved = "inputs are rounded there as they are, neither divided nor rotated"
        assert of(every, turn=3) == f"{inside[0].path} at int8_token has no form in llm_int8: {moved}"
        divided = dataclasses.replace(planned(every), smooth={inside[0].path: np.ones(32, np.float32)})
        assert message_of(lambda: llm_int8_of(divided)).endswith(moved)
        rule = "llm_int8 rounds all of int8 by channel, or none, and of no others"
        assert of({**every, head: "int8_token"}) == f"inputs of lm_head.kernel at fp32 are rounded: {rule}"
        every.pop(inside[-1])
        message = f"inputs of layers.1.mlp.down_proj.kernel at int8_channel are not rounded: {rule}"
        assert of(every) == message
        assert of(dict.fromkeys(inside, "int8_token_outlier6") | {inside[1]: "int8_token_outlier4"}) == (
            "outliers begin at 4 and at 6: llm_int8 has one threshold for all"
        )


@pytest.fixture
def w8a8(rows):
    """Inputs of the layers at int8 of the mixed plan."""
    return [row for row in rows[0] if not any(end in row.path for end in ("down_proj", "{gate,up}_proj"))]


class TestW8A8:
    def test_it_is_read_back_bit_for_bit(self, planned, w8a8, tmp_path):
        exported = planned(dict.fromkeys(w8a8, "int8_token"), "hf")
        written = TARGETS["hf"].save(tmp_path / "out", exported, "x")
        assert written == (tmp_path / "out/model.safetensors").stat().st_size == TARGETS["hf"].size_bytes(exported, "x")
        assert_same(exported, load_codes(tmp_path / "out"))
        want = exported.dequantized()
        for path, param in load(str(tmp_path / "out")).params.items():
            np.testing.assert_array_equal(np.asarray(param), np.asarray(want[path]), err_msg=path)

    def test_int8_weights_are_as_they_are_and_the_config_says_how_inputs_are_rounded(self, planned, w8a8, tmp_path):
        exported = planned(dict.fromkeys(w8a8, "int8_token"), "hf")
        TARGETS["hf"].save(tmp_path / "out", exported, "x")
        tensors = load_file(tmp_path / "out/model.safetensors")
        for end, shape in (("q_proj", (32, 1)), ("o_proj", (1,))):
            q = exported.qtensors[f"layers.0.self_attn.{end}.kernel"]
            module = f"model.layers.0.self_attn.{end}"
            assert {name for name in tensors if module in name} == {f"{module}.weight", f"{module}.weight_scale"}
            np.testing.assert_array_equal(tensors[f"{module}.weight"], np.asarray(q.qvalue)[0].T)
            assert tensors[f"{module}.weight_scale"].shape == shape
            np.testing.assert_array_equal(
                tensors[f"{module}.weight_scale"].reshape(-1), np.asarray(q.scale).reshape(-1)
            )
        config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision"
        by_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        found = {}
        for group in config["config_groups"].values():
            found[group["weights"]["strategy"], group["weights"]["symmetric"]] = group
        assert {key: (group["format"], group["input_activations"]) for key, group in found.items()} == {
            ("channel", True): ("int-quantized", by_token),
            ("tensor", True): ("int-quantized", by_token),
            ("group", True): ("pack-quantized", None),
            ("group", False): ("pack-quantized", None),
        }

    def test_the_commands_round_the_inputs_of_int8_layers_and_write_them(
        self, quantized, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        tiny.write_folder(tmp_path / "model", CONFIG)
        artifacts.write_stage(tmp_path / "plan.json", "plan", orbax.load(quantized["hf"]).plan)
        quantize = ("quantize", "model", "plan.json+int8_token@int8", "--method", "rtn", "-o", "q")
        assert exit_code(*quantize) == 0
        rounded = orbax.load(tmp_path / "q")
        assert all("self_attn" in path for path in rounded.plan["activations"])
        assert len(rounded.plan["activations"]) == 4  # of two layers, the input of q, k and v, and that of o
        assert exit_code("export", "q", "--to", "hf", "-o", "out", "--json") == 0
        assert_same(rounded, load_codes(tmp_path / "out"))
        capsys.readouterr()
        assert exit_code("export", "q", "--to", "gptq", "-o", "no") == 2
        assert "holds weights only" in " ".join(capsys.readouterr().err.split())
        assert exit_code("quantize", "model", "plan.json+int8_token@int3", "--method", "rtn", "-o", "none") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.endswith("@int3: no input is read by weights of int3 alone; the plan has fp16, int4, int8")

    def test_the_cache_has_no_weights_that_it_depends_on(self, model, quantized):
        choices = {path: q.scheme for path, q in orbax.load(quantized["hf"]).qtensors.items()}
        every = uniform_rows(model.trace(1, 16), "int8_token", "int8_head")
        kept = rows_at(every, "int4", choices)
        assert {row["kind"] for row in kept.values()} == {"activation", "kv"}
        inputs = {path for path, row in kept.items() if row["kind"] == "activation"}
        assert inputs == {f"layers.{i}.mlp.{end}.kernel" for i in (0, 1) for end in ("{gate,up}_proj", "down_proj")}

    def test_without_activations_int8_is_packed(self, planned):
        assert not compressed_tensors_of(planned({}, "hf")).rounds

    def test_what_is_not_rounded_there(self, planned, rows, w8a8):
        of = lambda chosen: message_of(lambda: compressed_tensors_of(planned(chosen, "hf")))
        rule = "hf rounds all of int8 by channel, or none, and of no others"
        every = dict.fromkeys(w8a8, "int8_token")
        assert of(dict.fromkeys(rows[0], "int8_token")) == (
            f"inputs of layers.0.mlp.gate_proj.kernel at int4_g16 are rounded: {rule}"
        )
        assert of({**every, rows[1]: "int8_token"}) == f"inputs of lm_head.kernel at fp16 are rounded: {rule}"
        every.pop(w8a8[0])
        path = "layers.0.self_attn.q_proj.kernel"
        assert of(every) == f"inputs of {path} at int8_channel are not rounded: {rule}"
        assert of(dict.fromkeys(w8a8, "int8_token_outlier6")) == (
            f"{w8a8[0].path} at int8_token_outlier6 has no form in hf: outliers begin at 6, and it keeps none in "
            "floating point; use int8_token"
        )
        for scheme in ("int8_token_asym", "int6_tensor_static", "fp8_e4m3_tensor_static", "int8_g32", "int4_token"):
            assert of({w8a8[0]: scheme}) == (
                f"{w8a8[0].path} at {scheme} has no form in hf: inputs are rounded there as they are, by int8_token, "
                "int8_tensor_static or int8_tensor_static_asym"
            )

    @pytest.mark.parametrize(
        "inputs",
        [
            None,
            {"num_bits": 8, "dynamic": False},
            {"num_bits": 4, "strategy": "token", "dynamic": True},
            {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False},
            {"num_bits": 8, "strategy": "tensor", "type": "float"},
        ],
    )
    def test_inputs_that_are_rounded_otherwise_are_not_read(self, inputs):
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "int-quantized"}
        config = {"format": "int-quantized", "config_groups": {"g": group}}
        assert "is not read" in message_of(lambda: CONTAINERS["hf"].reader(config))

    def test_codes_that_are_not_there(self, planned, w8a8):
        container = compressed_tensors_of(planned(dict.fromkeys(w8a8, "int8_token"), "hf"))
        q = RTN()(jnp.ones((1, 8, 4)), parse_scheme("int8_channel"))
        sites = {"a": Site("a.kernel", "a", "matmul", 8, 4, False)}
        reader = container.reader(container.config({"a": q.scheme}, sites))
        parts = dict(container.pack(q))
        parts["weight_scale"] = parts["weight_scale"][:-1]
        message = "weight [4, 8] and its scales do not hold [4, 8] codes of 8 bits"
        with pytest.raises(MpqError) as caught:
            reader.unpack("a", parts)
        assert str(caught.value) == message


def static_of(row, scheme: str) -> RoundedActivation:
    """A range of its own for every row, of either sign where there is a zero point."""
    at = 1 + len(row.path) / 7
    return RoundedActivation(row, parse_activation_scheme(scheme), (-at if "asym" in scheme else 0.0,), (2.3 * at,))


class TestStaticRanges:
    @pytest.fixture
    def planned(self, quantized, w8a8):
        """A mixed plan with inputs rounded in all three ways."""
        exported = orbax.load(quantized["hf"])
        schemes = ("int8_tensor_static_asym", "int8_tensor_static", "int8_token")
        chosen = [static_of(row, schemes[i % 3]) for i, row in enumerate(w8a8)]
        chosen = [RoundedActivation(c.spec, c.scheme) if c.scheme.static is None else c for c in chosen]
        ranges = {c.spec.path: np.array([c.low, c.high], np.float32) for c in chosen if c.low is not None}
        plan = exported.plan | {"activations": {c.spec.path: c.to_json() for c in chosen}}
        return dataclasses.replace(exported, plan=plan, ranges=ranges), chosen

    def test_they_are_read_back_as_the_same_steps_and_written_again_as_the_same_bytes(self, planned, tmp_path):
        exported, chosen = planned
        written = TARGETS["hf"].save(tmp_path / "out", exported, "x")
        assert written == (tmp_path / "out/model.safetensors").stat().st_size == TARGETS["hf"].size_bytes(exported, "x")
        read = load_codes(tmp_path / "out")
        assert_same(exported, read)
        assert read.plan["activations"].keys() == exported.plan["activations"].keys()
        for one in chosen:
            back = RoundedActivation.from_json(read.plan["activations"][one.spec.path], *read.of_row(one.spec.path))
            assert (back.spec, back.scheme) == (one.spec, one.scheme)
            assert (back.limits is None) == (one.limits is None)
            assert one.limits is None or back.step == one.step
        TARGETS["hf"].save(tmp_path / "again", read, "x")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert load(str(tmp_path / "out")).params.keys() == read.shapes.keys()

    def test_what_is_stored(self, planned, tmp_path):
        """Codes of a value by the formula that compressed-tensors has are ours, less 128 where they have no sign."""
        exported, chosen = planned
        TARGETS["hf"].save(tmp_path / "out", exported, "x")
        tensors = load_file(tmp_path / "out/model.safetensors")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["dtype"] == "float16"
        x = np.linspace(-3, 4, 501, dtype=np.float32).reshape(1, 1, -1)
        for one in (c for c in chosen if c.limits is not None):
            for path in one.spec.weights:
                module = f"model.{path.removesuffix('.kernel')}"
                scale, zero = tensors[f"{module}.input_scale"], tensors.get(f"{module}.input_zero_point")
                assert (scale.dtype, scale.shape) == (np.float16, (1,))
                assert (zero is None) == (not one.scheme.asymmetric)
                middle = 0 if zero is None else int(zero[0])
                codes = np.clip(np.round(x / np.float32(scale) + middle), -128, 127)
                ours = dataclasses.replace(one, spec=dataclasses.replace(one.spec, width=501))(jnp.asarray(x), 1)
                # That of -128 is none of ours where the range is symmetric.
                codes = np.maximum(codes, -127) if zero is None else codes
                np.testing.assert_allclose(ours, (codes - middle) * np.float32(scale), rtol=1e-6)
        groups = config["quantization_config"]["config_groups"].values()
        told = [group["input_activations"] for group in groups if group["format"] == "int-quantized"]
        assert {(t["strategy"], t["symmetric"], t["dynamic"]) for t in told} == {
            ("tensor", False, False),
            ("tensor", True, False),
            ("token", True, True),
        }

    def test_scales_of_weights_in_bfloat16_do_not_round_those_of_inputs(self, planned, tmp_path):
        exported, _ = planned
        as_bf16 = lambda q: dataclasses.replace(
            q, scale=q.scale.astype("bfloat16"), scheme=dataclasses.replace(q.scheme, scale_dtype="bfloat16")
        )
        qtensors = {path: as_bf16(q) if q.scheme.has_scale else q for path, q in exported.qtensors.items()}
        TARGETS["hf"].save(tmp_path / "out", dataclasses.replace(exported, qtensors=qtensors), "x")
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"

    def changed(self, exported, folder, change) -> str:
        """What reading the codes says after a change of tensors by name."""
        TARGETS["hf"].save(folder, exported, "x")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return message_of(lambda: load_codes(folder))

    def test_what_is_not_read(self, planned, tmp_path):
        name = "model.layers.0.self_attn.q_proj"
        wide = {f"{name}.input_scale": np.array([0.1], np.float32)}
        message = self.changed(planned[0], tmp_path / "wide", lambda tensors: tensors.update(wide))
        assert message == (
            f"{name} of {tmp_path / 'wide'}: the scale of inputs 0.1 is no positive number of float16, as ours are"
        )
        other = {f"{name}.input_scale": np.array([0.5], np.float16)}
        message = self.changed(planned[0], tmp_path / "other", lambda tensors: tensors.update(other))
        assert message == (
            f"readers of the activation layers.0.self_attn.{{q,k,v}}_proj.kernel of {tmp_path / 'other'} round it "
            "differently, which is not read"
        )
        message = self.changed(planned[0], tmp_path / "none", lambda tensors: tensors.pop(f"{name}.input_scale"))
        assert message.startswith(f"{name} of {tmp_path / 'none'} is not as its config says (")


class TestLoaded:
    """A checkpoint that is read as a model computes what its runtimes do: inputs are rounded, too."""

    @pytest.fixture
    def outputs(self, model, tmp_path):
        """Of a plan whose folder is read, of the plan, and of its weights alone."""

        def make(exported: Exported, target: str):
            TARGETS[target].save(tmp_path / "out", exported, "x")
            tokens = jnp.asarray(np.random.default_rng(0).integers(0, 90, (2, 16)))
            rows = exported.plan["activations"].items()
            chosen = [RoundedActivation.from_json(row, *exported.of_row(path)) for path, row in rows]
            params, read = exported.dequantized(), load(str(tmp_path / "out"))
            want = with_activations(model, model.trace(), chosen).apply(params, tokens)
            return read.apply(read.params, tokens), want, model.apply(params, tokens)

        return make

    def test_of_compressed_tensors(self, planned, w8a8, outputs):
        read, want, alone = outputs(planned(dict.fromkeys(w8a8, "int8_token"), "hf"), "hf")
        np.testing.assert_allclose(read, want, rtol=1e-5, atol=1e-5)
        assert np.abs(read - alone).max() > 1e-3

    def test_of_llm_int8_with_outliers(self, planned, rows, outputs):
        read, want, alone = outputs(planned(dict.fromkeys(rows[0], "int8_token_outlier1.5")), "llm_int8")
        np.testing.assert_allclose(read, want, rtol=1e-5, atol=1e-5)
        assert np.abs(read - alone).max() > 1e-4

    def test_weights_alone_stay_alone(self, planned, outputs):
        read, want, alone = outputs(planned({}, "hf"), "hf")
        np.testing.assert_allclose(read, alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(want, alone)

    def test_the_command_measures_it_so(self, planned, w8a8, tmp_path, model, capsys):
        (tmp_path / "text.txt").write_text(tiny.text())
        kl = []
        for name, chosen in (("alone", {}), ("rounded", dict.fromkeys(w8a8, "int8_token"))):
            TARGETS["hf"].save(tmp_path / name, planned(chosen, "hf"), "x")
            arguments = ["--reference", tiny.write_folder(tmp_path / f"model-{name}", CONFIG), "--json"]
            assert exit_code("evaluate", tmp_path / name, "--data", tmp_path / "text.txt", *arguments) == 0
            kl.append(json.loads(capsys.readouterr().out)["kl"])
        assert kl[0] != kl[1]
