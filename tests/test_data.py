"""Text to windows: BOS, masks, documents, splits."""

import json

import numpy as np
import pytest

from mpq.data import make_dataset, read_documents, require_disjoint, split_documents, take
from mpq.types import MpqError
from tests import tiny

TOKENIZER = tiny.tokenizer()
BOS = 0


def windows(documents, window=8, **options):
    return make_dataset(documents, TOKENIZER, bos=BOS, window=window, source="text", **options)


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def test_a_document_is_cut_into_consecutive_windows_that_start_with_bos():
    text = "x y z = x + y " * 8
    data = windows([text, "x"])
    stream = [BOS, *ids(text)]
    for row, start in zip(data.inputs[data.document == 0], range(0, len(stream), 8), strict=False):
        assert row[0] == BOS
        np.testing.assert_array_equal(row[1:], (stream[start : start + 8] + [0] * 8)[1:8])


def test_padding_is_masked_and_counts_nothing():
    data = windows(["x y z", "x y"] * 2)
    assert data.mask.sum(axis=1).tolist() == [1 + len(ids("x y z")), 1 + len(ids("x y"))] * 2
    assert data.num_tokens == 2 * (len(ids("x y z")) + len(ids("x y")))


def test_fill_up_windows_of_a_batch_count_nothing():
    data = windows(["x y z"] * 5)
    batches = list(data.batches(4))
    assert [b.inputs.shape for b in batches] == [(4, 8), (4, 8)]
    assert batches[1].document.tolist() == [4, -1, -1, -1]
    assert sum(float(b.weight.sum()) for b in batches) == data.num_tokens


def test_windows_of_a_single_document_are_documents_of_their_own():
    assert windows(["x y z = " * 40]).num_documents == len(windows(["x y z = " * 40]).inputs)


def test_windows_per_document_are_spread_evenly():
    long = "x y z = " * 100
    every = windows([long, "x"])
    some = windows([long, "x"], windows_per_document=3)
    rows = np.linspace(0, (every.document == 0).sum() - 1, 3).round().astype(int)
    np.testing.assert_array_equal(some.inputs[some.document == 0], every.inputs[rows])


def test_drop_tail_leaves_only_full_windows():
    assert windows(["x y z = " * 21], drop_tail=True).mask.all()


def test_the_digest_depends_on_content_only():
    digest = lambda text: windows([text] * 4).digest
    assert digest("x y z") == digest("x y z") != digest("x y x")


def test_take_goes_round_the_documents():
    data = windows(["x y z = " * 30, "x = y " * 20, "z x " * 24])
    counts = np.bincount(data.document)
    assert counts.min() > 1
    assert take(data, 3).document.tolist() == [0, 1, 2]
    assert sorted(take(data, 5).document.tolist()) == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(take(data, 3).inputs[1], data.inputs[counts[0]])
    assert take(data, len(data.inputs)) is data


@pytest.mark.parametrize("documents", [["x y z\n" * 400], ["a b"] * 100, ["x y\n" * 50, "z\n" * 10] * 3])
def test_split_gives_every_part_its_share_and_nothing_twice(documents):
    parts = split_documents(documents)
    sizes = np.array([sum(map(len, p)) for p in parts])
    assert "".join(map("".join, parts)) == "".join(documents)
    np.testing.assert_allclose(sizes / sizes.sum(), (0.5, 0.2, 0.3), atol=0.06)


def test_split_refuses_a_text_that_is_too_short():
    with pytest.raises(MpqError, match="too short to split in 3"):
        split_documents(["x"])


def test_overlapping_sets_are_refused_by_name():
    a, b = windows(["x y z", "x y", "x z"]), windows(["z y", "x y", "z z"])
    with pytest.raises(MpqError, match="calibration and test sets share 1 windows"):
        require_disjoint(calibration=a, test=b)
    require_disjoint(a=a, b=windows(["z y", "y y y", "z x"]))


def test_documents_of_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>\n two \n<|endoftext|>\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}))
    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "a.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.txt", b" <|endoftext|> ", "is empty"),
        ("a.jsonl", b"{}", "needs one object with a 'text' a line"),
        ("a.jsonl", b"not json", "needs one object with a 'text' a line"),
    ],
)
def test_a_bad_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MpqError, match=message):
        read_documents(tmp_path / name)


def test_a_missing_text_is_refused(tmp_path):
    with pytest.raises(MpqError, match="cannot be read"):
        read_documents(tmp_path / "no.txt")


def test_too_little_text_for_one_window_is_refused():
    with pytest.raises(MpqError, match="too short: it gives 4 tokens and one window takes 64"):
        windows(["x y z"], window=64)
    with pytest.raises(MpqError, match="too short: it gives 0 tokens"):
        windows(["x y z"] * 9, drop_tail=True)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(MpqError, match="window 1 is too short"):
        windows(["x y"], window=1)


def test_a_model_without_tokenizer_cannot_read_text():
    with pytest.raises(MpqError, match=r"no tokenizer\.json"):
        make_dataset(["x"], None, bos=None, window=8, source="text")
