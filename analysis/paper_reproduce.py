"""The paper's table of where results come from: of every folder what measures, and what writes the page."""

from analysis.paper_sources import Sources
from analysis.paper_tex import Table

BY_HAND = "–"
"""The page's tables are kept beside its text."""

ROWS = (
    ("quickstart", "configs/quickstart.py", "readme"),
    ("resnet20_cifar10", "configs/resnet20_cifar10.py", "readme"),
    ("minilm_stsb", "configs/minilm_stsb.py", "readme"),
    ("terrain", "configs/terrain.py", "readme"),
    ("bakeoff", "bakeoff", "bakeoff"),
    ("surrogate", "surrogate", "surrogate"),
    ("quadratic", "bench_quadratic", BY_HAND),
    ("rounding", "rounding", BY_HAND),
    ("codebooks", "rounding, distillation", "codebooks"),
    ("distillation", "distillation", "distillation"),
    ("weight_peers", "weight_peers, peer_folders", "weight_peers"),
    ("bit_search", "bit_search", "bit_search"),
    ("activations", "activations, image_activations", "activations"),
    ("outliers", "activations", "activations"),
    ("corrections", "conv_correction", "corrections"),
    ("qat", "qat", "qat"),
    ("kernels", "kernels_pallas.bench, kernel_parts", "kernels"),
    ("gguf", "gguf_peers", "gguf"),
    ("runtimes", "runtimes, vllm_cpu", BY_HAND),
    ("litert", "litert", BY_HAND),
)
"""Folder under `experiments/results`; what measures: modules for `python -m`, of `experiments` where nothing else is
said, or a config for `mpq run`; and the module of `analysis` that writes its page."""


def reproduce(_: Sources) -> Table:
    """A row a folder."""
    code = lambda text: text if text == BY_HAND else ", ".join(f"`{part}`" for part in text.split(", "))
    rows = tuple(tuple(map(code, row)) for row in ROWS)
    return Table(("folder", "measured by", "page by"), (False, False, False), rows).folded()
