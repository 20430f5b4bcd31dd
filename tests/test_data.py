"""Text to windows: BOS, masks, documents, splits."""

import json
import re

import numpy as np
import pytest

from mpq.data import (
    divide,
    make_dataset,
    read_documents,
    require_disjoint,
    row_digests,
    split_documents,
    take,
    unseen,
)
from mpq.tasks import CausalLM
from mpq.types import MpqError
from tests import tiny

TOKENIZER = tiny.tokenizer()
BOS = 0
TASK = CausalLM()


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
    assert TASK.counted(data.mask).sum() == 2 * (len(ids("x y z")) + len(ids("x y")))


def test_fill_up_windows_of_a_batch_count_nothing():
    data = windows(["x y z"] * 5)
    batches = list(data.batches(4))
    assert [b.inputs.shape for b in batches] == [(4, 8), (4, 8)]
    assert batches[1].document.tolist() == [4, -1, -1, -1]
    assert sum(TASK.counted(b.mask).sum() for b in batches) == TASK.counted(data.mask).sum() > 0


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


def different_windows():
    """Windows of five documents, no two alike."""
    rng = np.random.default_rng(0)
    return windows([" ".join(rng.choice(["x", "y", "z", "=", "+"], size=40)) for _ in range(5)])


def test_what_is_divided_is_whole_and_shares_no_window():
    data = different_windows()
    first, rest = divide(data, 4)
    assert first.inputs.tolist() == take(data, 4).inputs.tolist()
    assert sorted(first.inputs.tolist() + rest.inputs.tolist()) == sorted(data.inputs.tolist())
    require_disjoint(first=first, rest=rest)
    assert [len(part.inputs) for part in divide(data, 1000)] == [len(data.inputs) // 2, -(-len(data.inputs) // 2)]
    single = take(data, 1)
    assert divide(single, 3) == (single, single)


def test_windows_that_were_seen_are_left_out():
    data = different_windows()
    first, rest = divide(data, 4)
    left = unseen(data, frozenset(row_digests(first)), "stats")
    assert (left.digest, left.document.tolist()) == (rest.digest, rest.document.tolist())
    assert unseen(rest, frozenset(row_digests(first)), "stats") is rest
    message = (
        "all 4 windows of text are among those that stats was made of, on which rounding errors are smaller than "
        "elsewhere: give other text, or use fewer windows there (mpq calibrate --max-windows)"
    )
    with pytest.raises(MpqError, match=f"^{re.escape(message)}$"):
        unseen(first, frozenset(row_digests(data)), "stats")


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
        ("a.jsonl", b"{}", "needs one object with a 'text' a line: line 1 has none"),
        ("a.jsonl", b'{"text": 3}', "needs one object with a 'text' a line: line 1 has none"),
        ("a.jsonl", b"[1]", "needs one object with a 'text' a line: line 1 is list"),
        ("a.jsonl", b'{"text": "a"}\n\nnot json', "needs one object with a 'text' a line: line 3: Expecting value"),
        ("a.jsonl", b'{"text": " "}', "is empty"),
    ],
)
def test_a_bad_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MpqError, match=message):
        read_documents(tmp_path / name)


def test_line_ends_inside_a_json_string_do_not_end_the_line(tmp_path):
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert read_documents(tmp_path / "a.jsonl") == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    assert read_documents(tmp_path / "a.txt") == ["one"]


def test_no_more_is_tokenized_than_the_windows_take(monkeypatch):
    documents = [f"{'x' * (i % 5 + 1)} y z" for i in range(50)]
    whole = windows(documents)
    monkeypatch.setattr("mpq.data.text.CHUNK", 8)
    for most in (1, 8, 9, 50, None):
        np.testing.assert_array_equal(windows(documents, max_windows=most).inputs, whole.inputs[:most])
    assert windows([*documents, None], max_windows=20).num_documents == 20  # the last one would raise
    # A limit below one window's worth of tokens still reads on until there is that much.
    with pytest.raises(MpqError, match="gives 36 tokens and one window takes 64"):
        windows(["x y z"] * 9, window=64, max_windows=1)


def test_truncation_and_padding_of_the_tokenizer_file_play_no_role():
    own = tiny.tokenizer()
    own.enable_truncation(3)
    own.enable_padding(length=40, pad_id=5)
    data = make_dataset(["x y z = x + y " * 8], own, bos=BOS, window=8, source="text")
    np.testing.assert_array_equal(data.inputs, windows(["x y z = x + y " * 8]).inputs)
    assert own.truncation["max_length"] == 3  # the model's own tokenizer is left alone


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
