"""Kernels compiled for TPUs and for an H200 by their own compilers, with no accelerator: `make aot`.

What is committed in `experiments/results/kernels` is a budget; `python -m kernels_pallas.aot` writes it anew.
"""

import importlib.metadata
import json
from pathlib import Path

import pytest

from kernels_pallas import KernelError
from kernels_pallas.aot import gpu, tpu

pytestmark = pytest.mark.aot

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "kernels"
CYCLES = json.loads((RESULTS / "tpu_cycles.json").read_text(encoding="utf-8"))
H200 = json.loads((RESULTS / "h200_compiled.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("chip", tpu.CHIPS)
@pytest.mark.parametrize("case", tpu.CASES)
def test_a_tpu_kernel_compiles_and_keeps_its_budget(chip, case):
    """At most 5 % more cycles than what is committed of this version of libtpu."""
    found = tpu.cycles(chip, case)
    version = importlib.metadata.version("libtpu")
    if version not in CYCLES:
        pytest.skip(f"it compiles; there are budgets of libtpu {', '.join(CYCLES)}, not of {version}")
    budget = CYCLES[version]["cycles"][chip][case]
    if budget is None:
        assert found is None, "there is a profile now: write the budgets anew"
        pytest.skip(f"it compiles; libtpu {version} writes no profile of it")
    assert found is not None
    assert found <= 1.05 * budget


@pytest.mark.parametrize("case", gpu.CASES)
def test_the_hopper_kernel_is_what_its_design_says(case):
    """Tensor cores fed from registers without spills, and codes that become numbers without the conversion unit."""
    found = gpu.measure(case)
    assert found["spill_bytes"] == 0
    assert not found["warnings"]
    assert found["instructions"]["IGMMA" if "a8" in case else "HGMMA"] >= 4
    # Sums of integers become floating point; codes never do, by the conversion unit. A strip's number may, once, where
    # it is divided by batches that are no power of two: a reciprocal, with five conversions around it.
    converted = sum(count for name, count in found["instructions"].items() if name.startswith(("I2F", "F2I")))
    divisions = found["instructions"].get("MUFU", 0)
    assert "a8" in case or (divisions <= 1 and converted <= 5 * divisions)
    assert 8 <= found["registers"] <= 168
    assert 0 < found["shared_bytes"] <= 227 * 1024
    budget = H200["kernels"][case]
    assert found["registers"] <= 1.05 * budget["registers"]
    assert found["shared_bytes"] <= budget["shared_bytes"]
    assert ("rounding" in found) is ("a8" in case)
    if "rounding" in found:
        assert (found["rounding"]["spill_bytes"], found["rounding"]["warnings"]) == (0, [])
        assert found["rounding"]["registers"] <= 1.05 * budget["rounding"]["registers"]


def test_what_does_not_fit_is_said():
    """A float32 weight of 64 MB, and sums and activations for 1,024 tokens, in a vector memory of 128 MB or less."""
    case = next(iter(tpu.CASES))
    with pytest.raises(KernelError, match=f"^{case} with tiles .1024, 4096, 4096. does not compile for v5e: .+"):
        tpu.cycles("v5e", case, (1024, 4096, 4096))
