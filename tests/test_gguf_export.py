"""GGUF files: read back with the `gguf` package, sizes to the byte, and one sentence for what cannot be written."""

import dataclasses
import errno
import json
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, processors

from mpq import artifacts
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.gguf import container
from mpq.gguf.architectures import architecture_of, interleaved
from mpq.gguf.export import save, size_bytes
from mpq.gguf.names import gguf_name
from mpq.gguf.tokenizer import tokenizer_metadata
from mpq.models import FAMILIES, load
from mpq.quantize import RTN, Candidates
from mpq.types import MpqError
from tests import tiny
from tests.command import exit_code, finished_bars
from tests.gguf_cases import CONFIGS, byte_level, sentencepiece

CONFIG = tiny.CONFIG | {"vocab_size": 288, "tie_word_embeddings": False}
SCHEMES = [parse_scheme(text) for text in ("q8_0", "q4_0", "q5_0", "bf16", "f16", "f32")]
KEY = "tokenizer.ggml."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write_folder(tmp_path_factory.mktemp("gguf") / "model", CONFIG)
    byte_level().save(str(path / "tokenizer.json"))
    return load(str(path))


@pytest.fixture(scope="module")
def candidates(model):
    return Candidates(model.params, model.trace(1, 16).weights, RTN())


@pytest.fixture(scope="module")
def quantized(model, candidates, tmp_path_factory):
    """Every weight at another scheme, as an Orbax folder."""
    weights = model.trace(1, 16).weights
    choice = {w.path: SCHEMES[i % len(SCHEMES)] for i, w in enumerate(weights)}
    plan = artifacts.make_plan("mix", choice, None, weights, 0, model.digest)
    path = tmp_path_factory.mktemp("quantized") / "mix"
    orbax.save(path, **export_arguments(model, weights, candidates.choose(choice), plan))
    return path


@pytest.fixture
def exported(quantized) -> Exported:
    return orbax.load(quantized)


def test_the_command_writes_what_the_gguf_package_reads_as_the_model(quantized, exported, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    assert exit_code("export", quantized, "-o", out, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["size_bytes"] == out.stat().st_size == size_bytes(exported, "mix")
    reader = gguf.GGUFReader(out)
    assert finished_bars(printed.err)["export gguf"] == len(reader.tensors)
    params = exported.dequantized()
    assert {t.name for t in reader.tensors} == {gguf_name(path) for path in params}
    names = {gguf_name(path): path for path in params}
    heads = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
    for tensor in reader.tensors:
        want = np.asarray(params[names[tensor.name]])
        want = want.T if names[tensor.name].endswith("kernel") else want
        part = tensor.name.split(".")[-2]
        if part in heads:  # pairs of neighbours instead of halves of a head
            half = want.reshape(heads[part], 2, -1, want.shape[-1])
            want = np.stack([half[:, 0], half[:, 1]], axis=2).reshape(want.shape)
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        np.testing.assert_array_equal(got, want, err_msg=tensor.name)
        assert tensor.tensor_type.name == "F32" or want.ndim == 2


def test_the_metadata_is_that_of_the_config_and_the_tokenizer(exported, tmp_path):
    save(tmp_path / "model.gguf", exported, "a name")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "a name"
    expected = {"embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "context_length": 64}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8, "vocab_size": 288}
    expected |= {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": np.float32(1e-5)}
    assert {key: fields[f"llama.{key}"] for key in expected} == expected
    assert fields[f"{KEY}model"] == "gpt2"
    assert fields[f"{KEY}pre"] == "gpt-2"
    assert fields[f"{KEY}merges"] == ["d e", "de f"]
    tokens, kinds = fields[f"{KEY}tokens"], fields[f"{KEY}token_type"]
    assert tokens[:2] == ["<|bos|>", "<|endoftext|>"]
    assert tokens[-1] == "[PAD287]"
    assert kinds[:3] == [3, 3, 1]
    assert kinds[-1] == 5
    assert (fields[f"{KEY}bos_token_id"], fields[f"{KEY}eos_token_id"], fields[f"{KEY}add_bos_token"]) == (0, 1, True)


def test_the_size_is_known_to_the_byte_before_writing_for_random_plans(exported, candidates, model, tmp_path):
    rng, weights = np.random.default_rng(0), model.trace(1, 16).weights
    for trial in range(30):
        choice = {w.path: SCHEMES[rng.integers(len(SCHEMES))] for w in weights}
        plan = dataclasses.replace(exported, qtensors=candidates.choose(choice))
        predicted = size_bytes(plan, "n" * (1 + trial))
        assert save(tmp_path / "model.gguf", plan, "n" * (1 + trial)) == predicted
        assert (tmp_path / "model.gguf").stat().st_size == predicted


def test_equal_models_give_equal_bytes(exported, tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, exported, "model")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_permutation_pairs_neighbours():
    np.testing.assert_array_equal(interleaved(2, 4), [0, 2, 1, 3, 4, 6, 5, 7])


class TestWhatCannotBeWritten:
    def test_a_full_disk_leaves_nothing(self, exported, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(MpqError, match=r"cannot write .*model\.gguf"):
            save(tmp_path / "model.gguf", exported, "model")
        assert not list(tmp_path.iterdir())

    def test_without_the_gguf_package(self, exported, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MpqError, match=r"pip install 'mpq\[gguf\]'"):
            container.require_gguf()

    def test_a_scheme_that_ggml_has_not(self, exported, tmp_path):
        path = "lm_head.kernel"
        other = RTN()(jnp.asarray(exported.dequantized()[path])[None], parse_scheme("int4_g16"))
        with pytest.raises(MpqError, match=r"weight lm_head\.kernel cannot be written: scheme int4_g16 is no type"):
            save(tmp_path / "x", dataclasses.replace(exported, qtensors=exported.qtensors | {path: other}), "model")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"model_type": "opt"},
                "models of type 'opt' have no mapping to GGUF yet: it takes llama, mistral, qwen2, qwen3, gemma2, "
                "gemma3_text, phi3, gpt2",
            ),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
                "partial, dynamic or yarn rotary positions have no mapping to GGUF yet: export a model without",
            ),
            (
                {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
                "rotary positions that change with the window's length have no mapping to GGUF yet: export a model "
                "without",
            ),
            (
                {"hidden_act": "gelu"},
                "the model has an activation other than its own, with which llama.cpp's llama would compute another "
                "one: it has no place in GGUF",
            ),
        ],
    )
    def test_an_architecture_without_a_mapping(self, exported, change, message):
        with pytest.raises(MpqError) as raised:
            size_bytes(dataclasses.replace(exported, config=exported.config | change), "model")
        assert str(raised.value) == message

    @pytest.mark.parametrize(
        ("name", "change", "what"),
        [
            ("gemma2", {"query_pre_attn_scalar": 7}, "another factor on attention scores"),
            ("gemma2", {"tie_word_embeddings": False}, "a head of its own"),
            ("gemma2", {"layer_types": ["full_attention"] * 2}, "another pattern of windows"),
            ("gemma3", {"final_logit_softcapping": 3.0}, "soft caps"),
            ("gemma3", {"rope_local_base_freq": 7.0}, "other local rotary positions"),
            ("qwen3", {"attention_bias": True}, "other biases"),
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "a sliding window"),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise(self, name, change, what):
        config = CONFIGS[name] | change
        family = FAMILIES[config["model_type"]]
        decoder = family.parse(config | {"architectures": list(family.architectures)})
        with pytest.raises(MpqError, match=f"the model has {what}, with which llama.cpp's {name} would compute"):
            architecture_of(config).metadata(decoder)

    def test_a_model_without_tokenizer(self, exported):
        with pytest.raises(MpqError, match=r"no tokenizer\.json"):
            size_bytes(dataclasses.replace(exported, tokenizer_json=None), "model")

    def test_a_parameter_without_a_name(self):
        with pytest.raises(MpqError, match=r"layers\.0\.mlp\.router\.kernel has no GGUF name"):
            gguf_name("layers.0.mlp.router.kernel")

    def test_an_unknown_format_and_a_folder_that_is_none(self, quantized, tmp_path, capsys):
        assert exit_code("export", quantized, "--to", "tvm", "-o", tmp_path / "x") == 2
        assert "unknown format 'tvm'" in capsys.readouterr().err
        assert exit_code("export", tmp_path, "-o", tmp_path / "x") == 2
        assert not list(tmp_path.iterdir())


class TestTokenizers:
    def test_a_sentencepiece_style_one_gets_scores_by_the_ranks_of_its_merges(self):
        body = tokenizer_metadata(sentencepiece().to_str(), 264, None)
        assert body[f"{KEY}model"] == "llama"
        assert body[f"{KEY}add_space_prefix"] is True
        assert body[f"{KEY}add_bos_token"] is False
        scores = dict(zip(body[f"{KEY}tokens"], body[f"{KEY}scores"], strict=True))
        assert scores["ab"] > scores["abc"] > scores["a"]
        kinds = dict(zip(body[f"{KEY}tokens"], body[f"{KEY}token_type"], strict=True))
        assert [kinds[t] for t in ("<unk>", "<0x00>", "a")] == [2, 6, 1]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: tiny.tokenizer(), "it cuts text by"),
            (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "its model is 'WordLevel'"),
            (lambda: sentencepiece(("ab", "abc", "bc"), (("a", "b"), ("ab", "c"), ("b", "c"))), "'a bc' make a third"),
            (
                lambda: sentencepiece(
                    ("ab", "abc", "bc"), (("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a"), ("a", "bc"))[:3]
                ),
                "make a third",
            ),
        ],
    )
    def test_others_are_refused(self, make, message):
        with pytest.raises(MpqError, match=message):
            tokenizer_metadata(make().to_str(), 300, 1)

    def test_merges_of_one_token_must_follow_one_another(self):
        merges = (("a", "b"), ("b", "c"), ("ab", "c"), ("c", "c"), ("a", "bc"))
        made = sentencepiece(("ab", "bc", "abc", "cc"), merges)
        with pytest.raises(MpqError, match="between two that make the same one"):
            tokenizer_metadata(made.to_str(), 300, 1)

    def test_byte_fallback_without_the_spaces_of_sentencepiece_is_refused(self):
        made = sentencepiece()
        made.normalizer = normalizers.NFC()
        with pytest.raises(MpqError, match="it has byte fallback, and text is normalized by"):
            tokenizer_metadata(made.to_str(), 300, 1)

    def test_more_tokens_than_the_model_has_rows(self):
        with pytest.raises(MpqError, match="the tokenizer has token 259, and the model 100 rows"):
            tokenizer_metadata(byte_level().to_str(), 100, 1)

    def test_tokens_on_both_sides_of_a_text(self):
        made = byte_level()
        template = {"single": "<|bos|> $A <|endoftext|>", "special_tokens": [("<|bos|>", 0), ("<|endoftext|>", 1)]}
        made.post_processor = processors.TemplateProcessing(**template)
        with pytest.raises(MpqError, match="it puts 2 tokens around a text"):
            tokenizer_metadata(made.to_str(), 300, 1)
