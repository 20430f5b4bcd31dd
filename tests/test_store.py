"""The append-only item store survives a kill and refuses what is not its own."""

import pytest

from mpq.store import ItemStore
from mpq.types import MpqError


def test_values_survive_reopening(tmp_path):
    path = tmp_path / "items.jsonl"
    store = ItemStore(path, "inputs")
    store.put("a", [1.5, None])
    store.put("b", {"x": 0.1})
    again = ItemStore(path, "inputs")
    assert again.get("a") == [1.5, None]
    assert again.get("b") == {"x": 0.1}
    assert again.get("c") is None


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_line_cut_short_loses_only_itself(tmp_path, cut):
    path = tmp_path / "items.jsonl"
    store = ItemStore(path, "inputs")
    store.put("a", 1)
    store.put("b", 2)
    path.write_bytes(path.read_bytes()[:-cut])
    again = ItemStore(path, "inputs")
    assert again.get("a") == 1
    assert again.get("b") is None
    again.put("b", 3)
    assert ItemStore(path, "inputs").get("b") == 3


def test_a_damaged_line_is_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    ItemStore(path, "inputs").put("a", 1)
    path.write_bytes(path.read_bytes().replace(b"1]", b"2]", 1))
    with pytest.raises(MpqError, match="damaged in line 1"):
        ItemStore(path, "inputs")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("hello\n")
    with pytest.raises(MpqError, match="damaged in line 1"):
        ItemStore(path, "inputs")


def test_other_inputs_are_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    ItemStore(path, "one").put("a", 1)
    with pytest.raises(MpqError, match="made from other inputs"):
        ItemStore(path, "two")
