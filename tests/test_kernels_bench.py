"""The benchmark of kernels: what it writes, and that its figures are of the matmuls that it names."""

import json
import re

import numpy as np
import pytest

from kernels_pallas import bench
from kernels_pallas.cases import CONFORMANCE, Case, draw
from kernels_pallas.devices import Device
from kernels_pallas.native_build import library
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
    assert printed[0].split() == list(bench.COLUMNS)
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
