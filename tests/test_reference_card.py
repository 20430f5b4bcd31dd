"""The exported reference model: names, bytes, texts and every number of its card, on a tiny model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from experiments import reference_card, reference_card_text, stdlib_corpus, train_reference
from mpq.data.text import SEPARATOR, read_documents
from mpq.models.llama import Llama, LlamaConfig, parse_config

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TRAINING = dataclasses.replace(train_reference.Training(), steps=7, batch=2, window=32, peak_lr=0.25)
HISTORY = [{"step": s, "train_loss": 5.0 / s, "held_out_nll": 6.0 / s, "device": "a chip"} for s in range(1, 8)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty small documents, in a folder laid out like a library."""
    root = tmp_path_factory.mktemp("library")
    for i in range(120):
        body = f"def function_{i}(x):\n    return x + {i * i}  # naïve\n" * (1 + i % 5)
        (root / f"module_{i}.py").write_text(body, encoding="utf-8")
    return stdlib_corpus.read(root)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    config, train_reference.MODEL = train_reference.MODEL, CONFIG
    try:
        return train_reference.load_or_train_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json", corpus)
    finally:
        train_reference.MODEL = config


@pytest.fixture(scope="module")
def state():
    """Graph and parameters as training leaves them; weights large enough that the logits are far from uniform."""
    graph, params = nnx.split(Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), nnx.Param)
    return graph, jax.tree.map(lambda p: 4 * p, params)


@pytest.fixture(scope="module")
def folder(state, tokenizer, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "reference"
    reference_card.export(out, *state, tokenizer, corpus, CONFIG, TRAINING, HISTORY)
    return out


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "training.json").read_text())


def rounded_model(params):
    """The NNX model itself, float32, with weights rounded to bfloat16: the oracle of everything exported."""
    graph, _ = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(1)), nnx.Param)
    return nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params))


def test_the_config_is_read_back_as_it_was(folder):
    config = json.loads((folder / "config.json").read_text())
    assert parse_config(config) == CONFIG.decoder
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert config["torch_dtype"] == "bfloat16"


def test_tensors_have_hugging_face_names_and_shapes(folder):
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    block = {
        "input_layernorm.weight": (32,),
        "mlp.down_proj.weight": (32, 48),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "post_attention_layernorm.weight": (32,),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.v_proj.weight": (16, 32),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert shapes == expected | {"model.embed_tokens.weight": (300, 32), "model.norm.weight": (32,)}


def test_tensors_are_the_parameters_rounded_to_bfloat16(folder, state):
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}
    layer = state[1]["layers"][1]
    for ours, theirs in (
        (layer["self_attn"]["q_proj"]["kernel"], tensors["model.layers.1.self_attn.q_proj.weight"].T),
        (layer["mlp"]["down_proj"]["kernel"], tensors["model.layers.1.mlp.down_proj.weight"].T),
        (layer["input_layernorm"]["scale"], tensors["model.layers.1.input_layernorm.weight"]),
        (state[1]["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"]),
    ):
        ours = np.asarray(ours[...], np.float32)
        # 8 significant bits: half a unit in the last place is at most 2**-8 of the value
        assert np.all(np.abs(theirs.astype(np.float32) - ours) <= 2.0**-8 * np.abs(ours))


def test_an_untied_head_is_stored_transposed():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    params = nnx.state(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
    head = reference_card.checkpoint_tensors(params)["lm_head.weight"]
    np.testing.assert_array_equal(head.T, np.asarray(params["lm_head"]["kernel"][...]).astype(jnp.bfloat16))


def test_the_folder_loads_with_the_same_logits(folder, state):
    from mpq.models import load

    model = load(str(folder))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16), np.int32)
    assert set(model.stored.values()) == {"bfloat16"}
    # the same operations on the same numbers; only fusion may differ, a few units in the last place of logits near 10
    np.testing.assert_allclose(model.apply(model.params, tokens), rounded_model(state[1])(tokens), atol=1e-4)


def test_texts_are_whole_documents_of_their_split(folder, corpus, record):
    for name, split in (("calibration", corpus.train), ("selection", corpus.selection), ("test", corpus.test)):
        library = dict(split)
        documents = read_documents(folder / "text" / f"{name}.txt")
        assert documents == [library[path].strip() for path in record["documents"][name]]
        assert len(documents) == len(split)  # all of them are far below the limit


def test_choose_keeps_to_the_limit_in_hash_order():
    documents = [(f"{i}.py", "x" * (10 + i) + "\n") for i in range(50)] + [("bad.py", f"a {SEPARATOR} b\n")]
    chosen = reference_card.choose(documents, 400)
    assert len(reference_card.join(chosen).encode()) <= 400
    assert chosen == reference_card.choose(documents[::-1], 400)
    smallest_left = min(len(text) for _, text in set(documents[:-1]) - set(chosen))
    assert len(reference_card.join([*chosen, ("", "x" * smallest_left)]).encode()) > 400  # nothing more would fit
    assert "bad.py" not in dict(reference_card.choose(documents, 10**6))


def test_join_ends_every_document_with_a_line_end():
    assert reference_card.join([("a", "1"), ("b", "2\n")]) == f"1\n{SEPARATOR}\n2\n"


def test_pieces_predict_every_token_once():
    ids = [0, *range(10, 30)]
    cut = reference_card.pieces(ids, window=8)
    assert all(piece[0] == 0 and 2 <= len(piece) <= 8 for piece in cut)
    assert [i for piece in cut for i in piece[1:]] == ids[1:]
    assert reference_card.pieces([0], window=8) == []


def test_the_held_out_loss_is_that_of_the_model(record, state, tokenizer, corpus):
    model, nats, tokens = nnx.jit(rounded_model(state[1])), 0.0, 0
    for _, text in corpus.test:
        for piece in reference_card.pieces(
            tokenizer.encode(text).ids, TRAINING.window
        ):  # one window at a time, float64
            inputs = np.full((1, TRAINING.window), 99, np.int32)  # padded with a token, not with zeros
            inputs[0, : len(piece)] = piece
            logits = np.asarray(model(inputs)[0, : len(piece) - 1], np.float64)
            peak = logits.max(-1)
            log_normalizer = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
            nats += float(np.sum(log_normalizer - logits[np.arange(len(piece) - 1), piece[1:]]))
            tokens += len(piece) - 1
    row = record["held_out"]["whole test split"]
    size = sum(len(text.encode()) for _, text in corpus.test)
    assert (row["tokens"], row["bytes"]) == (tokens, size)
    # float32 log-softmax of logits near 10: an absolute error of some 1e-6 a token
    np.testing.assert_allclose(row["nats_per_token"], nats / tokens, atol=1e-5)
    np.testing.assert_allclose(row["bits_per_byte"], row["nats_per_token"] * tokens / size / np.log(2), rtol=1e-12)
    assert record["corpus"]["splits"]["test"]["tokens"] == tokens + len(corpus.test)  # and a BOS each


def test_greedy_takes_the_likeliest_token_every_time(record, state, tokenizer):
    model = nnx.jit(rounded_model(state[1]))
    start = tokenizer.encode("def function_").ids
    ids = reference_card.greedy(model, start, 20)
    assert ids[: len(start)] == start
    assert len(ids) == len(start) + 20
    likeliest = np.argmax(model(np.array([ids[:-1]], np.int32))[0], axis=-1)  # all at once, without padding
    assert ids[len(start) :] == likeliest[len(start) - 1 :].tolist()


def test_samples_continue_their_prompts(record):
    assert tuple(sorted(record["samples"])) == tuple(sorted(reference_card.PROMPTS))
    assert all(text.startswith(prompt) and len(text) > len(prompt) for prompt, text in record["samples"].items())


def test_the_command_names_what_is_not_default(record):
    assert record["command"].endswith(
        "--training.steps 7 --training.batch 2 --training.window 32 --training.peak-lr 0.25"
    )
    assert reference_card.command(train_reference.Training()).endswith("--out mpq/assets/reference_lm")
    twice = train_reference.Training(restarts=(10, 20))
    assert reference_card.command(twice).endswith("--training.restarts 10 20")


def test_each_cycle_of_the_schedule_warms_up_stays_and_decays_to_zero():
    training = train_reference.Training(steps=300, restarts=(100,), warmup=10, decay=0.5)
    rate = train_reference.schedule(training, 2.0)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 50, 75, 99)], [0.0, 1.0, 2.0, 2.0, 1.0, 0.04], atol=1e-6)
    np.testing.assert_allclose(
        [rate(s) for s in (100, 105, 110, 200, 250, 300)], [0.0, 1.0, 2.0, 2.0, 1.0, 0.0], atol=1e-6
    )


def test_the_card_shows_the_record(folder, record, corpus):
    text = (folder / "README.md").read_bytes().decode()  # carriage returns of a sample as they are
    assert record["command"] in text
    assert corpus.digest in text
    assert record["corpus"]["python"] in text
    assert f"{record['model']['parameters']:,}" in text
    for row in record["held_out"].values():
        assert f"| {row['nats_per_token']:.4f} | {row['bits_per_byte']:.4f} |" in text
    for row in HISTORY:
        assert f"| {row['step']} | {row['train_loss']:.4f} | {row['held_out_nll']:.4f} |" in text
    for sample in record["samples"].values():
        assert sample.rstrip() in text


def test_parameters_count_every_element_once(record, state):
    assert record["model"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state[1]))
    assert record["training"]["tokens_seen"] == 7 * 2 * 32


@pytest.mark.parametrize(("length", "rows"), [(3, 12), (12, 12), (13, 12), (28, 12), (100, 12)])
def test_a_thinned_history_ends_with_the_last_row(length, rows):
    history = [{"step": s} for s in range(length)]
    kept = reference_card_text.thinned(history, rows)
    assert len(kept) == min(length, rows)
    assert kept[-1] == history[-1]
    assert [row["step"] for row in kept] == sorted({row["step"] for row in kept})


def test_the_same_model_gives_the_same_bytes(folder, state, tokenizer, corpus, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "stale.txt").write_text("left over")
    reference_card.export(tmp_path / "again", *state, tokenizer, corpus, CONFIG, TRAINING, HISTORY)
    files = lambda root: {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert files(tmp_path / "again") == files(folder)
