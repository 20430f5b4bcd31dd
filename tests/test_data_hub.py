"""Data sets of the hub, by a stand-in for the `datasets` library: columns, splits, revisions, what is missing."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mpq.data.sources import read_set, read_sets
from mpq.inputs import Tokens
from mpq.types import MpqError
from tests.data_cases import encoder, images, model, pixels, word_ids, word_tokenizer
from tests.test_data_sentences import expected_row

LIMITS = {"calibration": 40, "selection": 10, "test": 20}


class Split:
    """What is used of `datasets.Dataset`: the column names, the length, a column, and a selection of rows."""

    def __init__(self, **columns):
        self.columns = columns
        self.column_names = list(columns)
        self.rows_read = 0

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def select(self, indices):
        part = Split(**{name: [values[i] for i in indices] for name, values in self.columns.items()})
        self.rows_read += len(part)
        return part

    def __getitem__(self, name):
        return iter(self.columns[name])  # a lazy column in the library, no list


@pytest.fixture
def hub(monkeypatch):
    """`hub(**splits)` installs a library that serves them, and returns the list of what it was asked for."""

    def install(**splits):
        asked = []

        def load_dataset(path, revision=None):
            asked.append((path, revision))
            if not splits:
                raise FileNotFoundError(f"Dataset '{path}' doesn't exist\nmore lines")
            return splits

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return asked

    return install


def read(reads, source, which="test", limit=1000, window=6):
    return read_set(reads, source, which, window=window, limit=limit)


def three(reads, source, limits=LIMITS, window=6):
    return read_sets(reads, source, window=window, limits=limits, windows_per_document=None)


def language_model():
    return model(Tokens(16, bos=1), "causal_lm", word_tokenizer())


def texts(first, count):
    return [f"w{i} a b c" for i in range(first, first + count)]


def test_documents_for_a_language_model(hub):
    asked = hub(train=Split(text=["", *texts(0, 699)]), test=Split(text=texts(1000, 300)))
    sets = three(language_model(), "datasets:some/texts@abc", window=8)
    assert asked == [("some/texts", "abc")]
    assert [len(data.inputs) for data in sets.values()] == [40, 10, 20]
    # Contiguous shares: the selection set begins at row 500 of 700, and row 0 is empty.
    for name, first, count in (("calibration", 0, 40), ("selection", 499, 10), ("test", 1000, 20)):
        expected = [[1, *word_ids(text), 0, 0, 0] for text in texts(first, count)]
        np.testing.assert_array_equal(sets[name].inputs, expected)
        assert sets[name].mask.sum(axis=1).tolist() == [5] * count
    assert read(language_model(), "datasets:some/texts", limit=20, window=8).digest == sets["test"].digest


def test_only_the_documents_that_are_needed_are_read(hub, monkeypatch):
    monkeypatch.setattr("mpq.data.hub.CHUNK", 16)
    split = Split(text=texts(0, 1000))
    hub(train=split)
    sets = three(language_model(), "datasets:some/texts", window=8)
    assert [len(data.inputs) for data in sets.values()] == [40, 10, 20]
    assert split.rows_read <= 40 + 10 + 20 + 3 * 16


@pytest.mark.parametrize("names", [("train", "test"), ("train", "validation")])
def test_pairs_of_sentences_by_split(hub, names):
    pairs = lambda first, n: Split(
        sentence1=[f"w{i}" for i in range(first, first + n)],
        sentence2=[f"w{i + 500}" for i in range(first, first + n)],
        score=[i / 100 for i in range(first, first + n)],
    )
    hub(**dict(zip(names, (pairs(0, 70), pairs(100, 30)), strict=True)))
    sets = three(encoder(), "datasets:some/pairs")
    assert [len(data.inputs) for data in sets.values()] == [40, 10, 20]
    data = sets["test"]
    for i in range(0, 20, 2):
        number = round(100 * data.labels[i])
        assert 100 <= number < 130
        assert data.inputs[i].tolist() == expected_row(f"w{number}", 6)[0]
        assert data.inputs[i + 1].tolist() == expected_row(f"w{number + 500}", 6)[0]
    assert data.document.tolist() == np.arange(10).repeat(2).tolist()
    assert read(encoder(), f"datasets:some/pairs:{names[1]}").num_documents == 30
    assert read(encoder(), "datasets:some/pairs", "calibration").num_documents == 70


def test_texts_with_labels_and_without(hub):
    hub(train=Split(text=[f"w{i}" for i in range(30)], label=list(range(30))))
    data = read(encoder("classification"), "datasets:some/texts")
    assert data.labels.dtype == np.int32
    np.testing.assert_array_equal(data.inputs[:, 1] - word_ids("w0")[0], data.labels)
    assert read(encoder("regression"), "datasets:some/texts").labels.shape == (30, 1)
    assert read(encoder("embedding"), "datasets:some/texts").labels is None


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return Image.open(file)


def test_images_with_labels(hub):
    x = pixels(30)
    split = Split(image=[png(array) for array in x], label=list(range(30)))
    hub(train=split)
    sets = three(images(), "datasets:some/images", dict.fromkeys(LIMITS, 4), window=None)
    assert split.rows_read == 12
    for data in sets.values():
        np.testing.assert_array_equal(data.inputs, x[data.labels])
    hub(train=Split(image=[png(array) for array in x]))
    assert read(images("embedding"), "datasets:some/images", window=None).labels is None


@pytest.mark.parametrize(
    ("reads", "columns", "message"),
    [
        (language_model(), ["content"], "lacks the column text: it has content"),
        (encoder(), ["sentence1", "similarity"], "lacks the column sentence2, score: it has sentence1, similarity"),
        (encoder("classification"), ["sentence"], "lacks the column text, label: it has sentence"),
        (encoder("regression"), ["text", "y"], "lacks the column label: it has text, y"),
        (images(), ["img", "label"], "lacks the column image: it has img, label"),
    ],
)
def test_a_missing_column_is_named_with_those_that_there_are(hub, reads, columns, message):
    hub(train=Split(**{name: ["a"] * 4 for name in columns}))
    with pytest.raises(MpqError, match=f"'datasets:some/set' {message}$"):
        read(reads, "datasets:some/set", window=None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b"], "label": [0, -1]}, "row 1 of datasets:some/set has the label -1: a class is an integer"),
        ({"text": ["a", "b"], "label": [None, 1]}, "row 0 of datasets:some/set has no label, and others have"),
        ({"text": ["a", None], "label": [0, 1]}, "row 1 of datasets:some/set has no text but None"),
        ({"text": ["a", ""], "label": [0, 1]}, "row 1 of datasets:some/set has an empty text"),
    ],
)
def test_a_bad_row_is_refused_by_number(hub, columns, message):
    hub(train=Split(**columns))
    with pytest.raises(MpqError, match=message):
        read(encoder("classification"), "datasets:some/set")


def test_splits_that_do_not_say_what_to_take_are_refused(hub):
    hub(one=Split(text=["a"]), two=Split(text=["b"]))
    with pytest.raises(MpqError, match="has the splits one, two: name one, datasets:some/set:one"):
        read(language_model(), "datasets:some/set")
    with pytest.raises(MpqError, match="data set some/set has no split 'three': it has one, two"):
        read(language_model(), "datasets:some/set:three")


def test_a_data_set_that_cannot_be_loaded_is_refused_in_one_line(hub):
    hub()
    with pytest.raises(MpqError, match=r"could not be loaded \(Dataset 'some/set' doesn't exist\)$"):
        read(language_model(), "datasets:some/set")


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MpqError, match=r"need an extra: pip install 'mpq\[data\]'"):
        read(language_model(), "datasets:some/set")


@pytest.mark.parametrize("source", ["datasets:", "datasets:name", "datasets:a/b/c", "datasets:a/b@", "datasets:a/b:"])
def test_a_misspelt_source_is_refused(source):
    with pytest.raises(MpqError, match="is misspelt: write datasets:OWNER/NAME"):
        read(language_model(), source)
