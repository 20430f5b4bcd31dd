r"""Quickstart: the reference language model, every stage once.

Run:     mpq run experiments/configs/quickstart.py   (what `make demo` ends in)
Writes:  runs/quickstart-<digest>/: report.html, frontier.png, frontier.svg, plan.json, quantized/, results.json,
record.json
"""

from mpq.config import RunConfig

CONFIG = RunConfig(
    name="quickstart",
    model="reference",
    data="reference",
    schemes=("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int8_g64", "bf16"),
    metrics=("kl", "fisher", "hessian_trace"),
    allocate_by="kl",
    method="gptq",
    compare_methods=("rtn",),
    budgets=("3.0bpw", "int3_g64", "3.5bpw", "int4_g64"),
    hand_out="3.5bpw",
    sensitivity_windows=(("kl", 4), ("fisher", 8), ("hessian_trace", 1)),
    selection_windows=16,
    test_windows=28,
    batch_size=2,
    windows_per_document=2,
)
