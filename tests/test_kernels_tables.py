"""Tuned tables: their files, whose goes first, and what a broken one does."""

import dataclasses
import json

import pytest

from kernels_pallas import KernelError, tables
from kernels_pallas.backend import Problem
from kernels_pallas.dispatch import BACKENDS, choose
from kernels_pallas.tables import Entry, as_json, entries, file_name, nearest, new_table, read_table

PROBLEM = Problem(16, 4096, 4096, 1, 4, 128, "cpu", False, False, "float32", None)
ENTRY = Entry(PROBLEM, "reference", (), "measured", 20.0)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Of the user and of the package, both empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "_SHIPPED", tmp_path / "shipped")
    own, shipped = tables.own_folder(), tmp_path / "shipped"
    own.mkdir(parents=True)
    shipped.mkdir()
    entries.cache_clear()
    yield own, shipped
    entries.cache_clear()


def write(folder, *found):
    (folder / "cpu.json").write_text(json.dumps(as_json(new_table("cpu", found))))


def test_a_table_is_read_as_it_is_written():
    other = dataclasses.replace(ENTRY, backend="tpu", config=(16, 128, 128), source="aot")
    table = new_table("TPU v5 lite", [ENTRY, other])
    assert read_table(json.dumps(as_json(table))) == table
    assert set(table.versions) == {"jax", "jaxlib"}
    assert file_name(table.device) == "tpu-v5-lite.json"


@pytest.mark.parametrize("text", ["", "[]", '{"entries": []}', '{"device": "cpu", "versions": {}, "entries": [{}]}'])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(KernelError, match=r"^not a tuned table \((JSONDecodeError|TypeError|KeyError): .*\)$"):
        read_table(text)


def test_a_source_is_one_of_two():
    guessed = dataclasses.replace(ENTRY, source="guessed")
    with pytest.raises(
        KernelError, match=r"^an entry of a tuned table has the source 'guessed': allowed are measured, aot$"
    ):
        read_table(json.dumps(as_json(new_table("cpu", [guessed]))))


def test_the_users_table_goes_before_the_packages(folders):
    own, shipped = folders
    assert entries("cpu") == ()
    write(shipped, ENTRY)
    entries.cache_clear()
    assert entries("cpu") == (ENTRY,)
    assert choose(PROBLEM, "cpu") == ("reference", ())
    write(own, dataclasses.replace(ENTRY, backend="cpu"))
    entries.cache_clear()
    assert choose(PROBLEM, "cpu") == ("cpu", ())


def test_a_broken_table_is_left_aside(folders):
    own, shipped = folders
    (own / "cpu.json").write_text('{"device": 1')
    write(shipped, ENTRY)
    with pytest.warns(UserWarning, match=r"cpu.json is left aside: not a tuned table .*; remove it or tune again"):
        assert choose(PROBLEM, "cpu") == ("reference", ())


def test_another_dtype_or_zero_points_count_as_a_doubling():
    near = dataclasses.replace(ENTRY, problem=dataclasses.replace(PROBLEM, m=32, x_dtype="bfloat16"), microseconds=1.0)
    half = dataclasses.replace(PROBLEM, x_dtype="bfloat16", m=16)
    assert nearest(PROBLEM, [near, ENTRY]) is ENTRY
    assert nearest(half, [near, ENTRY]) is near  # equally far, and faster
    assert nearest(dataclasses.replace(PROBLEM, zeros=True), [ENTRY]) is ENTRY
    assert nearest(dataclasses.replace(PROBLEM, batch=2), [ENTRY]) is None


def test_tables_that_ship_name_backends_and_tiles_that_there_are():
    paths = sorted(tables._SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        table = read_table(path.read_text())
        assert path.name == file_name(table.device)
        assert table.entries
        for entry in table.entries:
            assert BACKENDS[entry.backend].legal(entry.problem, entry.config)
            assert entry.microseconds > 0
