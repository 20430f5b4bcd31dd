"""GGUF files read as models: what the exporter wrote, what it did not, and one sentence for what is damaged."""

import json

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from mpq.formats import parse_scheme
from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf import reader
from mpq.gguf.architectures import architecture_named
from mpq.gguf.export import save
from mpq.gguf.pre_tokenizers import PRE_TOKENIZERS
from mpq.gguf.tokenizer import tokenizer_metadata
from mpq.gguf.tokenizer_of import chat_template, tokenizer_of
from mpq.models import FAMILIES, load, load_shapes
from mpq.models.checkpoint import save_orbax
from mpq.types import MpqError
from tests import gguf_cases, tiny
from tests.command import exit_code
from tests.gguf_cases import CONFIGS, byte_level, quantized, random_model, sentencepiece

SCHEMES = [parse_scheme(text) for text in ("q8_0", "q4_1", "q5_0", "bf16", "f16", "iq4_nl")]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
KEY = "tokenizer.ggml."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a chat template."""
    path = tiny.write_folder(tmp_path_factory.mktemp("reading") / "model", tiny.CONFIG | {"vocab_size": 288})
    byte_level().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    return quantized(load(str(folder)), SCHEMES, tmp_path_factory.mktemp("reading") / "out")


@pytest.fixture(scope="module")
def file(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "model.gguf"
    save(path, exported, "tiny")
    return path


def small(path, metadata=(), tensors=(), architecture="llama"):
    """A file of these keys and tensors, as the `gguf` package writes them."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in dict(metadata).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestRoundTrip:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_architecture_comes_back_as_it_was_exported(self, name, tmp_path):
        model = random_model(name)
        written = quantized(model, SCHEMES[:4:3], tmp_path / "out")
        save(tmp_path / "model", written, name)  # known by its first bytes
        back, want = load(str(tmp_path / "model")), written.dequantized()
        assert back.params.keys() == want.keys()
        # The same bits; scales of Gemma's norms are stored with one added, which rounds them.
        exact = {"rtol": 0, "atol": 2**-23 if model.config["model_type"].startswith("gemma") else 0}
        for path, value in want.items():
            np.testing.assert_allclose(np.asarray(back.params[path]), np.asarray(value), **exact, err_msg=path)
        tokens = np.random.default_rng(0).integers(0, 280, (2, 40))
        got = jax.jit(back.apply)(back.params, tokens)
        # Frequencies are stored as float32 divisors, epsilons as float32: positions up to 40 turn by at most 5e-6.
        np.testing.assert_allclose(got, jax.jit(model.apply)(want, tokens), rtol=0, atol=2e-4)
        context = 48 if name == "mistral" else 64
        assert (back.inputs.bos, back.inputs.context) == (model.inputs.bos, context)

    def test_every_type_that_mpq_stores_is_decoded_to_the_same_bits(self, tmp_path):
        config = tiny.CONFIG | {"vocab_size": 288, "hidden_size": 256, "intermediate_size": 256}
        path = tiny.write_folder(tmp_path / "model", config)
        byte_level().save(str(path / "tokenizer.json"))
        written = quantized(load(str(path)), [*GGML_SCHEMES.values(), parse_scheme("bf16")], tmp_path / "out")
        save(tmp_path / "m.gguf", written, "m")
        back, want = load(str(tmp_path / "m.gguf")), written.dequantized()
        assert {t.kind for t in reader.read(tmp_path / "m.gguf").tensors.values()} == {*GGML_SCHEMES, "bf16", "f32"}
        for name, value in want.items():
            np.testing.assert_array_equal(np.asarray(back.params[name]), np.asarray(value), err_msg=name)

    def test_the_chat_template_is_kept_by_exports_and_checkpoints(self, file, exported, tmp_path):
        back = load(str(file))
        assert back.config["chat_template"] == exported.config["chat_template"] == TEMPLATE
        save_orbax(back, tmp_path / "saved")
        assert load(str(tmp_path / "saved")).config["chat_template"] == TEMPLATE
        assert chat_template({}) is None

    def test_a_list_of_templates_gives_the_default_one(self, folder, tmp_path):
        path = tiny.write_folder(tmp_path / "model")
        named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert load(str(path)).config["chat_template"] == "y"

    def test_other_types_are_decoded_by_the_package_or_refused_by_name(self, tmp_path):
        values = np.random.default_rng(0).choice([-0.5, 0.0, 0.5], (4, 256)).astype(np.float32)
        kinds = gguf.GGMLQuantizationType
        ternary = gguf.quants.quantize(values, kinds.TQ2_0)
        tensors = [("t", ternary, kinds.TQ2_0), ("u", np.zeros((1, 292), np.uint8), kinds.Q8_K)]
        found = reader.read(small(tmp_path / "x.gguf", tensors=tensors)).tensors
        np.testing.assert_array_equal(found["t"].values(), values)
        with pytest.raises(
            MpqError, match=r"^tensor 'u' is q8_k, which has no decoder here: known are q8_0, .*, bf16$"
        ):
            found["u"].values()

    def test_values_that_are_not_finite_are_refused(self, tmp_path):
        half = np.full((1, 2), np.inf, np.float16)
        found = reader.read(small(tmp_path / "x.gguf", tensors=[("t", half, None)])).tensors["t"]
        with pytest.raises(MpqError, match=r"^tensor 't' holds NaN or infinity: the file is damaged, copy it again$"):
            found.values()


class TestTokenizers:
    @pytest.mark.parametrize(
        "make",
        [*(lambda pre=pre: byte_level(pre) for pre in PRE_TOKENIZERS), sentencepiece,
         lambda: sentencepiece(prefix=False, bos=True)],
    )  # fmt: skip
    def test_a_thousand_strings_give_the_same_tokens(self, make):
        tokenizer, rng = make(), np.random.default_rng(0)
        back = Tokenizer.from_str(tokenizer_of(tokenizer_metadata(tokenizer.to_str(), 288, 1)))
        letters = [*"abcdef   \n\t.,'123", "def", "abc", "  ", "'ll", "é", "你", "🙂", "<s>", "<|bos|>", "\r\n"]
        pieces = ["".join(rng.choice(letters, rng.integers(0, 30))) for _ in range(950)]
        pieces += ["".join(map(chr, rng.integers(32, 0xD7FF, 20))) for _ in range(50)]
        for piece in pieces:
            assert back.encode(piece).ids == tokenizer.encode(piece).ids, piece
        assert back.encode("a", "b").ids == [*back.encode("a").ids, *back.encode("b", add_special_tokens=False).ids]

    def test_files_without_keys_get_what_llama_cpp_does_by_itself(self):
        plain = tokenizer_metadata(sentencepiece(bos=True).to_str(), 288, 1)
        left_out = {key: value for key, value in plain.items() if "add_" not in key}
        assert Tokenizer.from_str(tokenizer_of(left_out)).encode("a").ids[0] == 1
        llama3 = tokenizer_metadata(byte_level("llama-bpe").to_str(), 288, 1)
        for pre, first in (("llama-v3", 0), ("qwen2", None)):
            body = {k: v for k, v in llama3.items() if "add_" not in k} | {KEY + "pre": pre}
            assert Tokenizer.from_str(tokenizer_of(body)).encode("").ids == ([] if first is None else [first])
        both = Tokenizer.from_str(tokenizer_of(llama3 | {KEY + "add_eos_token": True})).encode("d").ids
        assert (both[0], both[-1]) == (0, 1)
        assert tokenizer_of({}) is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "bert"}, "the file's tokenizer is of kind 'bert': read are gpt2, byte-level BPE, and llama"),
            ({"tokens": []}, "the file lacks the key 'tokenizer.ggml.tokens', without which its tokenizer is unknown"),
            ({"token_type": [1]}, "the file has 288 tokens and 1 types of tokens: it is damaged"),
            (
                {"pre": "martian"},
                "the file's tokenizer cuts text as 'martian' does, which is unknown here: known are gpt-2, llama-bpe, "
                "qwen2, smollm, llama3, llama-v3, deepseek-r1-qwen",
            ),
            ({"merges": ["d x"]}, "the file's tokenizer merges 'd x', which are not all tokens: it is damaged"),
            ({"model": "llama"}, "the file lacks the key 'tokenizer.ggml.scores', one for every token: its tokenizer "
                                 "is unknown"),
            ({"bos_token_id": 999}, "the file's tokenizer adds BOS and names none of its tokens: it is damaged"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, change, message):
        body = tokenizer_metadata(byte_level().to_str(), 288, 1) | {KEY + key: value for key, value in change.items()}
        with pytest.raises(MpqError) as raised:
            tokenizer_of(body)
        assert str(raised.value) == message


class TestDamage:
    def test_a_truncated_file_is_refused_wherever_it_ends(self, file, tmp_path):
        whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
        for length in (*range(64), *np.linspace(64, len(whole) - 1, 60).astype(int)):
            cut.write_bytes(whole[:length])
            with pytest.raises(MpqError, match=r"(truncated or damaged|is no GGUF file).*"):
                reader.read(cut)
        cut.write_bytes(whole[:-40])
        assert exit_code("inspect", cut) == 2

    def test_a_damaged_header_gives_one_sentence_or_a_model(self, file, tmp_path):
        whole, rng, bad = bytearray(file.read_bytes()), np.random.default_rng(0), tmp_path / "bad.gguf"
        start = len(whole) - sum(t.nbytes for t in reader.read(file).tensors.values())
        refused: list[str] = []
        for place in rng.integers(4, start, 150):
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(8)
            bad.write_bytes(changed)
            try:
                load_shapes(str(bad))
            except MpqError as error:
                refused.append(str(error))
        assert not any("\n" in sentence for sentence in refused)
        assert len(refused) > 15  # text of tokens is a large part of a header, and any text will do

    def test_sentences(self, tmp_path, file):
        missing, other = tmp_path / "none.gguf", tmp_path / "text.gguf"
        with pytest.raises(MpqError) as raised:
            load(str(missing))
        assert str(raised.value) == f"cannot read {missing}: No such file or directory; it should be a GGUF file"
        other.write_text("hello world")
        with pytest.raises(MpqError) as raised:
            load(str(other))
        assert str(raised.value) == f"{other} is no GGUF file: its first bytes are b'hell', not b'GGUF'"
        part = small(tmp_path / "part.gguf", {"split.count": 3})
        with pytest.raises(MpqError) as raised:
            load(str(part))
        assert str(raised.value) == f"{part} is one of 3 parts: merge them with llama-gguf-split --merge"
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[:-64])
        with pytest.raises(MpqError) as raised:
            load(str(cut))
        assert str(raised.value).startswith(f"{cut} is truncated or damaged (ValueError: it ends at ")
        assert str(raised.value).endswith("): copy it again")


KEYS = {"llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 1,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
EMBEDDING = ("token_embd.weight", np.zeros((8, 32), np.float32), None)


class TestWhatIsNoModelHere:
    @pytest.mark.parametrize(
        ("change", "tensors", "message"),
        [
            ({}, [], "it lacks the tensor 'token_embd.weight': is the file complete?"),
            ({}, [EMBEDDING], "it lacks the tensor 'blk.0.attn_norm.weight' (10 in all): is the file complete?"),
            ({"llama.block_count": None}, [EMBEDDING], "the file lacks the key 'llama.block_count', which llama models "
             "need"),
            ({"llama.expert_count": 8}, [EMBEDDING], "key 'llama.expert_count' is 8, which is unknown here: it may "
             "change the model"),
            ({"llama.attention.clamp_kqv": 8.0}, [EMBEDDING], "key 'llama.attention.clamp_kqv' is 8.0, which is "
             "unknown here: it may change the model"),
            ({"llama.rope.dimension_count": 4}, [EMBEDDING], "key 'llama.rope.dimension_count' is 4: supported is 8, "
             "the size of a head"),
            ({"llama.rope.scaling.type": "yarn"}, [EMBEDDING], "rotary positions are scaled by 'yarn': read are none, "
             "linear, and tensors of divisors"),
            ({"llama.attention.head_count": [4, 4]}, [EMBEDDING], "key 'llama.attention.head_count' is a list, one for "
             "every layer: only equal layers are read"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, change, tensors, message, tmp_path):
        keys = {key: value for key, value in (KEYS | change).items() if value is not None}
        path = small(tmp_path / "x.gguf", keys, tensors)
        with pytest.raises(MpqError) as raised:
            load_shapes(str(path))
        assert str(raised.value) == f"{path} cannot be read: {message}"

    def test_another_architecture(self):
        with pytest.raises(MpqError) as raised:
            architecture_named("mamba")
        assert str(raised.value) == (
            "GGUF files of architecture 'mamba' are not read yet: those read are llama, qwen2, qwen3, gemma2, gemma3, "
            "phi3, gpt2"
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"more": t["output_norm.weight"]}, "it holds the tensor 'more', which the model has no "
             "place for (1 in all)"),
            (lambda t: t | {"output_norm.weight": t["token_embd.weight"]}, "the tensor 'output_norm.weight' is "
             "[288, 32]: its keys call for [32]"),
        ],
    )  # fmt: skip
    def test_tensors_that_do_not_fit(self, change, message, file, monkeypatch):
        opened = reader.read(file)
        changed = reader.GgufFile(opened.path, opened.metadata, change(dict(opened.tensors)), opened.size_bytes)
        monkeypatch.setattr("mpq.gguf.load.read", lambda _: changed)
        with pytest.raises(MpqError) as raised:
            load_shapes(str(file))
        assert str(raised.value) == f"{file} cannot be read: {message}"


class TestCommands:
    def test_a_file_is_measured_against_the_checkpoint_it_was_made_of(self, file, folder, tmp_path, capsys):
        text = tmp_path / "test.txt"
        text.write_text(tiny.text(documents=4, seed=3))
        options = ("--data", text, "--window", "16", "--max-windows", "8", "--json")
        assert exit_code("evaluate", file, "--reference", folder, *options) == 0
        body = json.loads(capsys.readouterr().out)
        assert 0 < body["kl"] < 1
        assert body["size_bytes"] == file.stat().st_size
        assert 4.5 < body["bits_per_weight"] < 16
        other = tiny.write_folder(tmp_path / "other")  # cuts text otherwise
        assert exit_code("evaluate", file, "--reference", other, *options) == 2
        assert "is no reference for" in (said := capsys.readouterr().err)
        assert "their tokens of this text differ" in said

    def test_inspect_shows_types_and_bytes(self, file, exported, capsys):
        assert exit_code("inspect", file, "--json") == 0
        body = json.loads(capsys.readouterr().out)
        assert body["size_bytes"] == file.stat().st_size
        stored = {w["path"]: (w["stored"], w["size_bytes"]) for w in body["weights"]}
        kinds = {"fp16": "f16"}
        for spec in exported.weights:
            scheme = exported.qtensors[spec.path].scheme
            name = kinds.get(str(scheme), str(scheme))
            assert stored[spec.path] == (name, spec.size_bits(scheme) // 8)


def test_every_family_with_a_place_in_gguf_is_among_the_cases():
    assert {config["model_type"] for config in gguf_cases.CONFIGS.values()} <= FAMILIES.keys()
