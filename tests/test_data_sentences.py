"""Pairs and single texts for encoders: special tokens, truncation, padding, labels, broken lines."""

import json

import numpy as np
import pytest

from mpq.data import divide, take
from mpq.data.sources import read_set, read_sets
from mpq.inputs import Tokens
from mpq.types import MpqError
from tests.data_cases import CLS, SEP, WORDS, encoder, model, word_ids, word_tokenizer

PAIRS = [("a b c", "d e", 4.5), ('f "g', "h i j k l m n o p", 0.0), ("q", "r s t u v w x", 2.25)]


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_stsb(path, pairs=PAIRS):
    lines = [f"main\tMSRvid\t2012\t{i:04d}\t{score}\t{a}\t{b}" for i, (a, b, score) in enumerate(pairs)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_pairs(path, count):
    return write_jsonl(
        path, [{"sentence1": f"w{2 * i}", "sentence2": f"w{2 * i + 1}", "score": i / 10} for i in range(count)]
    )


def expected_row(text, window, pad=0):
    """By hand: what fits of the words between CLS and SEP, then padding."""
    row = [CLS, *word_ids(text)[: window - 2], SEP]
    return row + [pad] * (window - len(row)), [True] * len(row) + [False] * (window - len(row))


def by_text(data):
    """Every row's tokens that are not padding, with its mask, document and label."""
    labels = [None] * len(data.inputs) if data.labels is None else data.labels.tolist()
    return {
        tuple(r): (m.tolist(), d, y) for r, m, d, y in zip(data.inputs, data.mask, data.document, labels, strict=True)
    }


@pytest.mark.parametrize("form", ["tsv", "header", "jsonl"])
@pytest.mark.parametrize("pad", [0, 3])
def test_a_pair_is_two_consecutive_rows_of_one_document_with_its_score(tmp_path, form, pad):
    if form == "jsonl":
        rows = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in PAIRS]
        source = write_jsonl(tmp_path / "a.jsonl", rows)
    elif form == "tsv":
        source = write_stsb(tmp_path / "a.tsv")
    else:
        source = str(tmp_path / "a.tsv")
        lines = ["score\tsentence2\tid\tsentence1", *(f"{s}\t{b}\t7\t{a}" for a, b, s in PAIRS)]
        (tmp_path / "a.tsv").write_text("\n".join(lines))
    data = read_set(encoder(pad=pad), source, "test", window=6, limit=100)
    assert (data.inputs.dtype, data.mask.dtype, data.labels.dtype) == (np.int32, np.bool_, np.float64)
    assert data.document.tolist() == [0, 0, 1, 1, 2, 2]
    found = by_text(data)
    for a, b, score in PAIRS:
        (row_a, mask_a), (row_b, mask_b) = expected_row(a, 6, pad), expected_row(b, 6, pad)
        document = found[tuple(row_a)][1]
        assert found[tuple(row_a)] == (mask_a, document, score)
        assert found[tuple(row_b)] == (mask_b, document, score)
        assert data.inputs[2 * document].tolist() == row_a  # the first sentence comes first


def test_a_pair_is_a_pair_whatever_else_its_line_holds(tmp_path):
    rows = [{"text": "z", "sentence1": a, "sentence2": b, "score": s, "id": 7} for a, b, s in PAIRS]
    data = read_set(encoder(), write_jsonl(tmp_path / "a.jsonl", rows), "test", window=8, limit=100)
    assert data.document.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(data.labels[::2]) == [0.0, 2.25, 4.5]


def test_pairs_without_scores_and_single_texts_have_no_labels(tmp_path):
    pairs = write_jsonl(tmp_path / "a.jsonl", [{"sentence1": a, "sentence2": b} for a, b, _ in PAIRS])
    texts = write_jsonl(tmp_path / "b.jsonl", [{"text": a} for a, _, _ in PAIRS])
    data = read_set(encoder(), pairs, "test", window=8, limit=100)
    assert data.labels is None
    assert data.document.tolist() == [0, 0, 1, 1, 2, 2]
    data = read_set(encoder(), texts, "test", window=8, limit=100)
    assert data.labels is None
    assert data.document.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("classification", [2, 0, 1], np.array([2, 0, 1], np.int32)),
        ("regression", [0.5, -1, 2], np.array([[0.5], [-1], [2]], np.float32)),
        ("regression", [[0.5, 1], [2, 3], [4, 5]], np.array([[0.5, 1], [2, 3], [4, 5]], np.float32)),
        ("classification", [None, None, None], None),
    ],
)
def test_labels_of_texts_have_the_dtype_of_their_task(tmp_path, task, labels, expected):
    texts = ["a", "b c", "d e f"]
    rows = [{"text": t} if y is None else {"text": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    data = read_set(encoder(task), write_jsonl(tmp_path / "a.jsonl", rows), "test", window=5, limit=9)
    assert data.document.tolist() == [0, 1, 2]
    order = [texts.index(t) for row in data.inputs for t in texts if expected_row(t, 5)[0] == row.tolist()]
    assert sorted(order) == [0, 1, 2]
    if expected is None:
        assert data.labels is None
    else:
        assert data.labels.dtype == expected.dtype
        np.testing.assert_array_equal(data.labels, expected[order])


def test_truncation_and_padding_of_the_tokenizer_file_play_no_role(tmp_path):
    own = word_tokenizer()
    own.enable_truncation(3)
    own.enable_padding(length=40)
    source = write_stsb(tmp_path / "a.tsv")
    data = read_set(model(encoder().inputs, "embedding", own), source, "test", window=8, limit=9)
    assert data.digest == read_set(encoder(), source, "test", window=8, limit=9).digest
    assert own.truncation["max_length"] == 3  # the model's own tokenizer is left alone


def test_splits_keep_pairs_together_and_limits_count_rows(tmp_path):
    source = write_pairs(tmp_path / "a.jsonl", 40)
    limits = {"calibration": 9, "selection": 6, "test": 1000}
    sets = read_sets(encoder(), source, window=4, limits=limits, windows_per_document=None)
    assert [len(sets[w].inputs) for w in ("calibration", "selection", "test")] == [8, 6, 24]
    pairs = []
    for data in sets.values():
        words = data.inputs[:, 1].reshape(-1, 2) - word_ids("w0")[0]
        np.testing.assert_array_equal(words[:, 1], words[:, 0] + 1)
        np.testing.assert_allclose(data.labels, np.repeat(words[:, 0] / 20, 2))
        pairs += words[:, 0].tolist()
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(("rows", "first"), [(1, 2), (2, 2), (5, 4), (6, 6), (1000, 6)])
def test_what_is_divided_keeps_pairs_together(tmp_path, rows, first):
    # Sentences of a pair say much the same: rounding that saw one of them would flatter itself on the other.
    data = read_set(encoder(), write_pairs(tmp_path / "a.jsonl", 7), "test", window=4, limit=100)
    parts = divide(data, rows)
    assert [len(part.inputs) for part in parts] == [first, 14 - first]
    assert not set(parts[0].document.tolist()) & set(parts[1].document.tolist())
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), data.inputs)
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), data.labels)
    again = divide(parts[1], 3)
    assert not set(again[0].document.tolist()) & set(again[1].document.tolist())
    single = take(divide(data, 2)[0], 2)
    assert divide(single, 1) == (single, single)


def test_a_sentence_in_several_pairs_stays_in_one_set(tmp_path):
    rows = [{"sentence1": f"w{i % 30}", "sentence2": f"w{100 + i}", "score": 1} for i in range(60)]
    limits = dict.fromkeys(("calibration", "selection", "test"), 1000)
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    sets = read_sets(encoder(), source, window=4, limits=limits, windows_per_document=None)
    words = [set(data.inputs[:, 1].tolist()) for data in sets.values()]
    assert not words[0] & words[1] | words[1] & words[2] | words[0] & words[2]
    assert len(sets["test"].inputs) == 2 * 18  # the test set is whole
    assert "repeated examples left out" in sets["calibration"].source


def test_real_sentence_pairs(shared_data):
    path = shared_data / "text" / "stsb_dev.tsv"
    lines = [line.split("\t") for line in path.read_text().split("\n")[:-1]]
    words = {word for fields in lines for text in fields[5:7] for word in text.split()}
    reader = model(Tokens(64), "embedding", word_tokenizer([*WORDS[:4], *sorted(words)]))
    data = read_set(reader, str(path), "test", window=64, limit=10**6)
    assert data.num_documents == len(lines) == 1500
    assert sorted(data.labels[::2]) == sorted(float(fields[4]) for fields in lines)
    np.testing.assert_array_equal(data.labels[::2], data.labels[1::2])
    lengths = [min(64, 2 + len(text.split())) for fields in lines for text in fields[5:7]]
    assert sorted(data.mask.sum(axis=1)) == sorted(lengths)
    limits = {"calibration": 256, "selection": 128, "test": 2000}
    sets = read_sets(reader, str(path), window=64, limits=limits, windows_per_document=None)
    assert len(sets["test"].inputs) == 900
    assert len(sets["selection"].inputs) > 100
    assert len(sets["calibration"].inputs) > 200


PAIR = {"sentence1": "a", "sentence2": "b", "score": 1.0}
LABELLED = {"text": "a", "label": 1}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("embedding", [PAIR, {"sentence1": "a"}], "line 2 has \\['sentence1'\\]"),
        ("embedding", [PAIR, {"text": "a"}], "line 2 of .* has 1 texts, and those before 2"),
        ("embedding", [PAIR, PAIR | {"score": None}], "line 2 of .* has no label, and others have"),
        ("embedding", [PAIR, PAIR | {"score": "high"}], "line 2 of .* has the label 'high': needed is a number$"),
        ("embedding", [PAIR, PAIR | {"score": float("nan")}], "line 2 of .* has the label nan: it has to be finite"),
        ("embedding", [PAIR, PAIR | {"sentence2": " "}], "line 2 of .* has an empty text"),
        ("classification", [LABELLED, LABELLED | {"label": -1}], "line 2 of .* has the label -1: a class is"),
        ("classification", [LABELLED | {"label": 0.5}], "line 1 of .* has the label 0.5: a class is an integer"),
        ("classification", [LABELLED | {"label": True}], "line 1 of .* has the label True: a class is an integer"),
        ("classification", [LABELLED | {"label": 2**31}], "line 1 of .* has the label 2147483648"),
        ("classification", [LABELLED, {"sentence1": "a"}], "with 'text' and 'label' a line: line 2 has"),
        ("regression", [LABELLED | {"label": "x"}], "has the label 'x': needed is a number or a list of them"),
        ("regression", [LABELLED | {"label": []}], "has the label \\[\\]: needed is a number or a list"),
        (
            "regression",
            [LABELLED | {"label": [1.0, float("inf")]}],
            "has the label \\[1.0, inf\\]: it has to be finite",
        ),
        ("regression", [LABELLED | {"label": 1e39}], "has the label 1e\\+39: it has to be finite in float32"),
        ("regression", [LABELLED, LABELLED | {"label": [1, 2]}], "line 2 .* has 2 targets, and line 1 of .* 1: give"),
        ("regression", [], "is empty: give at least one line"),
    ],
)
def test_a_bad_line_is_refused_by_number(tmp_path, task, rows, message):
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(MpqError, match=message):
        read_set(encoder(task), source, "test", window=6, limit=9)


def test_broken_json_is_refused_by_line_number(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n{,}\n")
    with pytest.raises(MpqError, match=r"'sentence1', 'sentence2' and 'score' .* a line: line 2: Expecting"):
        read_set(encoder(), str(tmp_path / "a.jsonl"), "test", window=6, limit=9)


@pytest.mark.parametrize("line", ["a\tb\tc", "main\tf\t2012\t1\thigh\ta\tb", "main\tf\t2012\t1\t5.0\ta"])
def test_a_line_that_is_not_of_stsb_is_refused(tmp_path, line):
    path = tmp_path / "a.tsv"
    path.write_text("main\tf\t2012\t0\t5.0\ta\tb\n" + line)
    with pytest.raises(MpqError, match=r"line 2 of .* has no score and two sentences: give the columns of STS-B"):
        read_set(encoder(), str(path), "test", window=6, limit=9)


def test_a_text_that_has_no_token_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [LABELLED | {"text": "\n"}])
    with pytest.raises(MpqError, match=r"line 1 of .*a\.jsonl has an empty text"):
        read_set(encoder("classification"), source, "test", window=6, limit=9)


def test_a_window_that_special_tokens_fill_is_refused(tmp_path):
    with pytest.raises(MpqError, match="window 2 is too short: 2 tokens of each text are special ones"):
        read_set(encoder(), write_stsb(tmp_path / "a.tsv"), "test", window=2, limit=9)


def test_a_model_without_tokenizer_cannot_read_sentences(tmp_path):
    with pytest.raises(MpqError, match=r"no tokenizer\.json"):
        read_set(model(encoder().inputs, "embedding"), write_stsb(tmp_path / "a.tsv"), "test", window=6, limit=9)


def test_a_limit_below_one_pair_is_refused(tmp_path):
    with pytest.raises(MpqError, match="a limit of 1 rows leaves nothing of the test set: one example takes 2"):
        read_set(encoder(), write_stsb(tmp_path / "a.tsv"), "test", window=6, limit=1)
