"""Where the time of Hopper's matmuls goes, with a clock that needs no GPU."""

import json
import sys

import pytest

from experiments import kernel_parts
from kernels_pallas.cases import DECODE, Case
from kernels_pallas.tables import Entry, Table, read_table

SMALL = Case(2, 256, 128, 4, 128)


def test_a_row_has_every_kernel_of_a_config(monkeypatch):
    """Two calls of two kernels: medians by their place, names without what Mosaic appends."""
    times = [[("mpq_w4a16_mosaic_gpu_kernel", 3.0), ("add", 1.0)], [("mpq_w4a16_mosaic_gpu_kernel", 5.0), ("add", 1.0)]]
    monkeypatch.setattr(kernel_parts, "kernel_times", lambda run, calls: times)
    monkeypatch.setattr(kernel_parts, "calls", lambda case, megabytes: {"(2, 1)": int, "dense": int})
    first, dense = kernel_parts.measure(SMALL, 2, 1)
    kernels = {"0:mpq_w4a16": 4.0, "1:add": 1.0}
    assert first == {"case": str(SMALL), "config": "(2, 1)", "sum": 5.0, "kernels": kernels}
    assert dense["config"] == kernel_parts.DENSE


def test_every_config_and_the_dense_dot_are_called():
    found = kernel_parts.calls(SMALL, 1)
    assert list(found)[-1] == kernel_parts.DENSE
    assert len(found) >= 3
    (result,) = found[kernel_parts.DENSE]()
    assert result.shape == (2, 128)


def test_a_table_gets_the_fastest_config():
    case, rows = DECODE[0], []
    for config, micro in (("(4, 2, 8, 4, 1)", 9.0), ("(2, 2, 8, 8, 1)", 8.0), ("dense", 1.0)):
        rows.append({"case": str(case), "config": config, "sum": micro, "kernels": {}})
    table = kernel_parts.updated(Table("NVIDIA H200", {}, ()), rows)
    (entry,) = table.entries
    assert (entry.backend, entry.config, entry.microseconds, entry.problem.m) == (
        "hopper",
        (2, 2, 8, 8, 1),
        8.0,
        case.m,
    )
    kept = Entry(entry.problem, "dense", (), "measured", 40.0)
    again = kernel_parts.updated(Table("NVIDIA H200", {}, (kept, entry)), rows[:1])
    assert [(e.backend, e.microseconds) for e in again.entries] == [("dense", 40.0), ("hopper", 9.0)]


def test_the_command_writes_after_every_case(monkeypatch, tmp_path):
    out, table = tmp_path / "parts.json", tmp_path / "table.json"
    table.write_text(json.dumps({"device": "NVIDIA H200", "versions": {}, "entries": []}), encoding="utf-8")

    def measured(case, repeats, megabytes):
        row = {"case": str(case), "kernels": {}}
        return [{**row, "config": "(4, 2, 16, 4, 1)", "sum": 2.0}, {**row, "config": "dense", "sum": 4.0}]

    monkeypatch.setattr(kernel_parts, "measure", measured)
    arguments = ["--out", str(out), "--table", str(table), "--only", "^w4a16_g128-16x8192x8192-", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["kernel_parts", *arguments])
    kernel_parts.main()
    body = json.loads(out.read_text(encoding="utf-8"))
    assert (body["commit"], [row["sum"] for row in body["rows"]]) == ("abc", [2.0, 4.0])
    assert [entry.config for entry in read_table(table.read_text(encoding="utf-8")).entries] == [(4, 2, 16, 4, 1)]
    monkeypatch.setattr(sys, "argv", ["kernel_parts", "--out", str(out), "--only", "("])
    with pytest.raises(SystemExit):
        kernel_parts.main()
