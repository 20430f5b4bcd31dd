"""Which source suits which model, windows and limits, and text for language models."""

import json

import numpy as np
import pytest

from mpq.data import make_dataset, read_documents, split_documents
from mpq.data.sources import read_set, read_sets
from mpq.inputs import Tokens
from mpq.models import resolve
from mpq.types import MpqError
from tests import tiny
from tests.data_cases import PAD, encoder, images, model, pixels, word_ids, word_tokenizer

NAMES = ("calibration", "selection", "test")
LIMITS = {"calibration": 12, "selection": 4, "test": 8}


def language_model(context=16):
    return model(Tokens(context, bos=0, pad=PAD), "causal_lm", tiny.tokenizer())


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_text_is_cut_into_windows_by_shares(tmp_path, form):
    documents = tiny.text().split("<|endoftext|>")
    if form == "txt":
        source = write(tmp_path / "a.txt", tiny.text())
    else:
        source = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in documents))
    own = language_model()
    sets = read_sets(own, source, window=16, limits=LIMITS, windows_per_document=2)
    assert {name: len(data.inputs) for name, data in sets.items()} == LIMITS
    for name, part in zip(NAMES, split_documents(read_documents(tmp_path / f"a.{form}")), strict=True):
        expected = make_dataset(
            part, own.tokenizer, bos=0, window=16, max_windows=LIMITS[name], windows_per_document=2, source=""
        )
        assert sets[name].digest == expected.digest
        assert sets[name].source == f"{source} ({name})"
    whole = read_set(own, source, "selection", window=16, limit=10**6)
    assert whole.num_documents == len(documents)


def test_the_texts_of_the_reference_model_are_its_sets():
    own = language_model()
    sets = read_sets(own, "reference", window=16, limits=LIMITS, windows_per_document=None)
    for name, data in sets.items():
        documents = read_documents(resolve("reference") / "text" / f"{name}.txt")
        expected = make_dataset(documents, own.tokenizer, bos=0, window=16, max_windows=LIMITS[name], source="")
        assert data.digest == expected.digest
        assert data.digest == read_set(own, "reference", name, window=16, limit=LIMITS[name]).digest


def test_texts_that_overlap_are_refused(tmp_path):
    source = write(tmp_path / "a.txt", "<|endoftext|>".join(["x y z = x + y"] * 40))
    with pytest.raises(MpqError, match="calibration and selection sets share 1 windows: give data that do not overlap"):
        read_sets(language_model(), source, window=4, limits=LIMITS, windows_per_document=None)


@pytest.mark.parametrize("context", [16, 300])
def test_the_window_is_256_or_the_context_unless_it_is_stated(tmp_path, context):
    source = write(tmp_path / "a.txt", tiny.text())
    width = lambda window: read_set(language_model(context), source, "test", window=window, limit=4).inputs.shape[1]
    assert width(None) == min(256, context)
    assert width(9) == 9
    source = write(tmp_path / "a.jsonl", json.dumps({"text": "a b"}))
    data = read_set(encoder("classification", context), source, "test", window=None, limit=4)
    assert data.inputs.shape == (1, min(256, context))


def test_a_window_longer_than_the_context_is_refused(tmp_path):
    text = write(tmp_path / "a.txt", tiny.text())
    pairs = write(tmp_path / "a.jsonl", json.dumps({"text": "a b"}))
    for reads, source in ((language_model(16), text), (encoder(context=16), pairs)):
        with pytest.raises(MpqError, match="window 17 is longer than the model's context of 16: use at most that"):
            read_set(reads, source, "test", window=17, limit=4)
        with pytest.raises(MpqError, match="window 17 is longer"):
            read_sets(reads, source, window=17, limits=LIMITS, windows_per_document=None)


def test_images_have_no_window(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(20))
    source = str(tmp_path / "a.npz")
    assert read_set(images(), source, "test", window=10**6, limit=99).inputs.shape == (20, 2, 3, 3)
    sets = read_sets(images(), source, window=10**6, limits=LIMITS, windows_per_document=None)
    assert {name: len(data.inputs) for name, data in sets.items()} == {"calibration": 10, "selection": 4, "test": 6}


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(MpqError, match=f"the test set is limited to {limit} rows: it needs at least 1"):
        read_set(language_model(), "reference", "test", window=8, limit=limit)
    limits = LIMITS | {"selection": limit}
    with pytest.raises(MpqError, match=f"the selection set is limited to {limit} rows"):
        read_sets(language_model(), "reference", window=8, limits=limits, windows_per_document=None)


SENTENCES = r"reads \.tsv \(the columns of STS-B\) or \.jsonl of sentence pairs"
LABELLED = r"reads \.jsonl with 'text' and 'label' a line"
IMAGES = r"reads an array file \.npz, a folder of images"
TEXT = r"reads a text file, \.jsonl with a 'text' a line, 'reference'"


@pytest.mark.parametrize(
    ("reads", "source", "what"),
    [
        (language_model(), "a.npz", TEXT),
        (language_model(), "a.tsv", TEXT),
        (language_model(), "folder", TEXT),
        (encoder(), "a.txt", SENTENCES),
        (encoder(), "a.npz", SENTENCES),
        (encoder(), "folder", SENTENCES),
        (encoder(), "reference", SENTENCES),
        (encoder("classification"), "a.tsv", LABELLED),
        (encoder("regression"), "a.txt", LABELLED),
        (images(), "a.txt", IMAGES),
        (images(), "a.png", IMAGES),
        (images("regression"), "a.jsonl", IMAGES),
        (images(), "reference", IMAGES),
    ],
)
def test_a_source_that_does_not_suit_the_model_is_refused(tmp_path, monkeypatch, reads, source, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("a.npz", "a.tsv", "a.txt", "a.png", "a.jsonl"):
        (tmp_path / name).write_text("a")
    with pytest.raises(MpqError, match=f"data '{source}' does not suit: the {reads.task.name} model 'toy' {what}"):
        read_set(reads, source, "test", window=8, limit=4)
    with pytest.raises(MpqError, match="does not suit"):
        read_sets(reads, source, window=8, limits=LIMITS, windows_per_document=None)


@pytest.mark.parametrize("reads", [language_model(), encoder(), encoder("regression"), images()])
def test_a_source_that_is_not_there_is_refused(tmp_path, reads):
    with pytest.raises(
        MpqError, match=r"no\.txt' is no file or folder here: the .* model 'toy' reads .*datasets:OWNER/NAME"
    ):
        read_set(reads, str(tmp_path / "no.txt"), "test", window=8, limit=4)


def test_a_text_too_short_for_a_window_is_refused(tmp_path):
    source = write(tmp_path / "a.txt", "x y")
    with pytest.raises(MpqError, match="is too short: it gives 3 tokens and one window takes 16"):
        read_set(language_model(), source, "test", window=16, limit=4)


def test_an_empty_file_is_refused(tmp_path):
    for reads, name in ((language_model(), "a.txt"), (encoder(), "a.tsv"), (encoder("regression"), "a.jsonl")):
        with pytest.raises(MpqError, match=rf"{name}'? is empty"):
            read_set(reads, write(tmp_path / name, ""), "test", window=8, limit=4)


def test_files_that_are_not_text_are_refused(tmp_path):
    for reads, name in ((language_model(), "a.txt"), (encoder(), "a.tsv"), (encoder("regression"), "a.jsonl")):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(MpqError, match="cannot be read as UTF-8"):
            read_set(reads, str(tmp_path / name), "test", window=8, limit=4)


def test_a_language_model_without_bos_begins_with_the_text(tmp_path):
    source = write(tmp_path / "a.txt", "a b c d e f")
    data = read_set(model(Tokens(8), "causal_lm", word_tokenizer()), source, "test", window=4, limit=4)
    assert data.inputs[0].tolist() == word_ids("a b c d")
