"""The benchmark of kernels: what it writes, and that its figures are of the matmuls that it names."""

import json
import re

import jax
import jaxlib
import numpy as np
import pytest

from kernels_pallas import bench, tables
from kernels_pallas.cases import CONFORMANCE, SPEED, Case, draw
from kernels_pallas.devices import Device
from kernels_pallas.dispatch import choose
from kernels_pallas.native_build import library
from tests.command import exit_code
from tests.kernel_cases import bound, oracle


def test_writes_a_row_for_every_backend_that_runs_here(tmp_path, capsys):
    case = next(case for case in CONFORMANCE if case.bits == 2 and case.activation_bits)
    bench.main(
        [
            "--out",
            str(tmp_path / "new" / "cpu.json"),
            "--only",
            re.escape(str(case)),
            "--repeats",
            "2",
            "--megabytes",
            "0",
        ]
    )
    body = json.loads((tmp_path / "new" / "cpu.json").read_text())
    native = [] if isinstance(library(), str) else ["native"]
    assert [row["backend"] for row in body["rows"]] == ["dense_float32", "reference", "cpu", *native]
    for row in body["rows"]:
        assert row["case"] == str(case)
        assert 0 < row["p10"] <= row["p50"] <= row["p90"]
        # The dense dot has no rounded activations: half a step of 127 in each of 96 products is what it is off by.
        assert row["max_error"] < (0.05 if row["backend"] == "dense_float32" else 1e-5)
    assert body["environment"]["platform"] == "cpu"
    assert body["ceilings"]["bytes_per_s"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == " ".join(bench.COLUMNS.values()).split()
    assert len(printed) == 4 + len(native)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_its_oracle_is_that_of_the_tests(activation_bits):
    case = Case(3, 48, 5, 4, 16, activation_bits, zeros=True, x_dtype="float32")
    x, packed, arrays = draw(case, "plain", 0, exact=False)
    want, magnitude = oracle(case, x, arrays)
    # It differs by the float32 roundings of `dequantize` alone.
    assert (np.abs(bench.oracle(x, packed, activation_bits) - want) <= bound(case, magnitude)).all()


def test_a_row_counts_bytes_and_operations():
    case = Case(4, 1000, 500, 8, x_dtype="float32")
    limits = Device(bandwidth=1e9, macs={"float32": 1e9, "int8": 1e9}, unpack=1.0, fast_memory=0)
    x, packed, _ = draw(case, "plain", 0, exact=False)
    problem = bench.describe(x, packed, None)
    row = bench._row(case, "cpu", problem, np.array([4000.0] * 3), np.array([2000.0] * 3), limits, 0.0)
    assert row["gb_per_s"] == round((500_000 + 4 * 500 + 4 * 4000 + 4 * 2000) / 4000e-6 / 1e9, 3)
    assert row["speedup"] == 0.5
    assert row["roofline_percent"] == 50  # two million multiply-accumulates take 2 ms


def test_its_table_is_what_dispatch_goes_by(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = next(case for case in CONFORMANCE if case.bits == 2 and case.activation_bits)
    tables.entries.cache_clear()
    assert exit_code("bench", "kernels", "--only", f"^{case}$", "--repeats", 2, "--megabytes", 0, "--tune") == 0
    try:
        found = tables.entries("cpu")
        table = tables.read_table((tmp_path / "mpq" / "tuned" / "cpu.json").read_text())
        assert table.entries == found
        assert {entry.source for entry in found} == {"measured"}
        assert table.versions == {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        fastest = min(found, key=lambda entry: entry.microseconds)
        assert choose(fastest.problem, "cpu") == (fastest.backend, fastest.config)
    finally:
        tables.entries.cache_clear()


class TestTheCommand:
    def test_writes_what_it_prints(self, tmp_path, capsys):
        only = ["--only", re.escape(str(CONFORMANCE[1])), "--repeats", 1, "--megabytes", 0]
        assert exit_code("bench", "kernels", *only, "-o", tmp_path / "a.json", "--json") == 0
        body = json.loads(capsys.readouterr().out)
        assert body == json.loads((tmp_path / "a.json").read_text())
        assert [row["auto"] for row in body["rows"]].count(True) == 1
        assert {"processor", "cores", "native"} <= set(body["environment"])

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["kernel"], "unknown subject 'kernel': the valid ones are kernels"),
            (
                ["kernels", "--only", "("],
                "'(' is not a regular expression (missing ), unterminated subpattern at position 0)",
            ),
            (
                ["kernels", "--only", "w9"],
                f"no case matches 'w9': the first of {len(CONFORMANCE + SPEED)} is {CONFORMANCE[0]}",
            ),
            (["kernels", "--repeats", "0"], "repeats and chain are at least 1, megabytes at least 0"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, sentence, capsys):
        assert exit_code("bench", *arguments) == 2
        assert capsys.readouterr().err.strip() == f"mpq: {sentence}"
