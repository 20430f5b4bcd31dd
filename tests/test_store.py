"""Items are found by all that they depend on, survive a kill, and are refused by name where they are damaged."""

import re

import pytest

from mpq.store import FolderStore, MemoryStore, kept
from mpq.types import MpqError

MAKER = {"source": "abc"}


def never():
    raise AssertionError("computed again")


def files(folder):
    return sorted(folder.rglob("*.json"))


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path, MAKER)


def test_values_survive_reopening(tmp_path, store):
    nan = kept(store, lambda: [1.5, float("nan")], item="a", window=1)
    again = FolderStore(tmp_path, MAKER)
    assert repr(kept(again, never, window=1, item="a")) == repr(nan) == "[1.5, nan]"
    assert kept(again, lambda: 0.1 + 0.2, item="a", window=2) == kept(again, never, item="a", window=2) == 0.1 + 0.2
    assert len(files(tmp_path)) == 2


def test_other_inputs_or_another_maker_are_another_item(tmp_path, store):
    kept(store, lambda: 1, item="a", data="x")
    assert kept(store, lambda: 2, item="a", data="y") == 2
    assert kept(FolderStore(tmp_path, {"source": "def"}), lambda: 3, item="a", data="x") == 3
    assert kept(store, never, item="a", data="x") == 1


def test_without_a_store_everything_is_made():
    assert [kept(None, lambda n=n: n, item="a") for n in range(2)] == [0, 1]


def test_the_key_stands_in_the_file_in_clear(tmp_path, store):
    kept(store, lambda: 1, item="kl", weight="layers.0.up")
    assert files(tmp_path)[0].read_text().startswith('{"inputs": {"item": "kl", "weight": "layers.0.up"}, "maker": ')


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-30],
        lambda content: content.replace(b"0.25", b"0.26"),
        lambda content: content.replace(b"kl", b"kk"),
        lambda content: b"\xff" + content,
        lambda content: b"",
    ],
    ids=["truncated", "value", "key", "bytes", "empty"],
)
def test_a_damaged_item_is_refused_by_name(tmp_path, store, damage):
    kept(store, lambda: 0.25, item="kl")
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MpqError, match=f"{re.escape(str(path))} is damaged: delete it"):
        kept(FolderStore(tmp_path, MAKER), never, item="kl")
    path.unlink()
    assert kept(store, lambda: 0.25, item="kl") == 0.25


def test_an_item_under_the_name_of_another_is_refused_by_name(tmp_path, store):
    kept(store, lambda: 1, item="kl", data="x")
    (mine,) = files(tmp_path)
    kept(store, lambda: 2, item="kl", data="y")
    (other,) = set(files(tmp_path)) - {mine}
    mine.write_bytes(other.read_bytes())
    with pytest.raises(MpqError, match=f"{re.escape(str(mine))} holds an item of other inputs than its name says"):
        kept(store, never, item="kl", data="x")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(MpqError, match=r"cannot write .*scores"):
        kept(FolderStore(tmp_path / "scores", MAKER), lambda: 1, item="a")


def test_memory_forgets_nothing_while_it_lives():
    store = MemoryStore()
    assert kept(store, lambda: 1, item="a") == kept(store, never, item="a") == 1
