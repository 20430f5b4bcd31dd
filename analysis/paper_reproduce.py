"""The paper's table of where results come from: of every folder what measures, and what writes the page."""

from analysis.paper_sources import Sources
from analysis.paper_tex import Table

BY_HAND = "–"
"""The page's tables are kept beside its text."""

ROWS = (
    ("quickstart", "mpq run experiments/configs/quickstart.py", "analysis.readme"),
    ("resnet20_cifar10", "mpq run experiments/configs/resnet20_cifar10.py", "analysis.readme"),
    ("minilm_stsb", "mpq run experiments/configs/minilm_stsb.py", "analysis.readme"),
    ("terrain", "mpq run experiments/configs/terrain.py", "analysis.readme"),
    ("bakeoff", "python -m experiments.bakeoff", "analysis.bakeoff"),
    ("quadratic", "python -m experiments.bench_quadratic", BY_HAND),
    ("rounding", "python -m experiments.rounding", BY_HAND),
    ("codebooks", "python -m experiments.rounding, python -m experiments.distillation", "analysis.codebooks"),
    ("distillation", "python -m experiments.distillation", "analysis.distillation"),
    ("weight_peers", "python -m experiments.weight_peers, python -m experiments.peer_folders", "analysis.weight_peers"),
    ("bit_search", "python -m experiments.bit_search", "analysis.bit_search"),
    (
        "activations",
        "python -m experiments.activations, python -m experiments.image_activations",
        "analysis.activations",
    ),
    ("outliers", "python -m experiments.activations", "analysis.activations"),
    ("corrections", "python -m experiments.conv_correction", "analysis.corrections"),
    ("qat", "python -m experiments.qat", "analysis.qat"),
    ("kernels", "python -m kernels_pallas.bench, python -m experiments.kernel_parts", "analysis.kernels"),
    ("gguf", "python -m experiments.gguf_peers", "analysis.gguf"),
    ("runtimes", "python -m experiments.runtimes, python -m experiments.vllm_cpu", BY_HAND),
    ("litert", "python -m experiments.litert", BY_HAND),
)
"""Folder under `experiments/results`, the commands that measure, and the module that writes its page."""


def reproduce(_: Sources) -> Table:
    """A row a folder."""
    code = lambda text: text if text == BY_HAND else ", ".join(f"`{part}`" for part in text.split(", "))
    rows = tuple(tuple(map(code, row)) for row in ROWS)
    return Table(("folder", "measured by", "page by"), (False, False, False), rows)
