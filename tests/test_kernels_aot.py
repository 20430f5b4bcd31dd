"""What of the ahead-of-time harness needs no compiler: how a listing is read, and that budgets cover all kernels."""

import json
from pathlib import Path

import pytest

from kernels_pallas.aot import gpu, tpu
from kernels_pallas.cases import Case, draw
from kernels_pallas.errors import KernelError
from kernels_pallas.tables import read_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "kernels"


def test_a_listing_is_counted_by_instruction():
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/             @UP1  HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR8], R24 ;
        /*0040*/                   I2F.S8 R3, R4 ;
    """
    assert gpu.opcodes(listing) == {"LDC": 1, "BRA": 1, "HGMMA": 2, "I2F": 1}


@pytest.mark.parametrize("layout", ["tpu", "hopper"])
def test_shapes_are_those_of_a_packed_weight(layout):
    case = Case(3, 300, 200, 4, 128)
    x, packed = tpu.shapes(case, layout)
    real, weight, _ = draw(case, layout, 0, exact=True)
    assert (x.shape, x.dtype) == (real.shape, real.dtype)
    assert (packed.codes.shape, packed.codes.dtype) == (weight.codes.shape, weight.codes.dtype)
    assert (packed.scales.shape, packed.scales.dtype) == (weight.scales.shape, weight.scales.dtype)
    assert packed.spec == weight.spec
    assert tpu.problem_of(case, layout).layout == layout


def test_budgets_and_records_cover_every_kernel():
    budgets = json.loads((RESULTS / "tpu_cycles.json").read_text())
    assert len(budgets) >= 2
    for budget in budgets.values():
        assert set(budget["cycles"]) == set(tpu.CHIPS)
        assert all(set(cycles) == set(tpu.CASES) for cycles in budget["cycles"].values())
    for chip in tpu.CHIPS:
        found = [budget["cycles"][chip][case] for budget in budgets.values() for case in tpu.CASES]
        assert sum(count is not None for count in found) >= len(tpu.CASES)
    kernels = json.loads((RESULTS / "h200_compiled.json").read_text())["kernels"]
    assert set(kernels) == set(gpu.CASES)
    for case, kernel in kernels.items():
        assert kernel["spill_bytes"] == 0
        assert kernel["instructions"]["IGMMA" if "a8" in case else "HGMMA"] >= 4
        assert "w4" not in case or "I2F" not in kernel["instructions"]


def test_tables_by_compilers_say_so():
    for path in (ROOT / "kernels_pallas" / "tuned").glob("tpu-*.json"):
        table = read_table(path.read_text())
        assert {entry.source for entry in table.entries} == {"aot"}
        assert len(table.entries) == len(tpu.CASES)


def test_without_the_extra_a_tool_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"^there is no ptxas: install mpq\[aot\]$"):
        gpu._tool("ptxas")
