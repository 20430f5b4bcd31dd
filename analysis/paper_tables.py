"""The tables of the paper: those of the pages of results, with fewer rows and columns, and two of its own."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from analysis import activation_tables, activations, codebooks, corrections, distillation, gguf, qat, readme
from analysis import weight_peers as peers_page
from analysis.paper_reproduce import reproduce
from analysis.paper_runtimes import runtimes
from analysis.paper_sources import Json, Sources
from analysis.paper_tex import Table, parse


def results(sources: Sources) -> Table:
    """Plans of the reference model."""
    heads = {1: "bpw", 3: "KL, nats per token", 5: "same first choice"}
    return parse(readme.results_table(sources.run(readme.LANGUAGE_MODEL))).columns(0, 1, 2, 3, 4, 5, heads=heads)


def tasks(sources: Sources) -> Table:
    """Runs of the other tasks: mixed plans and the best uniform scheme that fits."""
    return parse(readme.tasks_table({run: sources.run(run) for run in readme.TASKS})).columns(1, 2, 3, 4)


def rounding(sources: Sources) -> Table:
    """One scheme for all weights of the blocks of the reference model, by format and algorithm."""
    found = codebooks.merged(list(sources.folder("codebooks").values()))
    result = next(result for result in found if result["record"]["config"]["model"] == "reference")
    table = parse(codebooks.rounding(result, "blocks"))
    return table.columns(0, 1, 2, 3, 4, heads={1: "bpw"})


def ingredients(sources: Sources) -> Table:
    """KL of plans of five budgets, an ingredient a row."""
    table = parse(distillation.table(sources.file("distillation/tiny1m"), "kl")).cells(_shorter)
    return dataclasses.replace(table, head=("weights of the blocks", *table.head[1:]))


def weight_peers(sources: Sources) -> Table:
    """The reference model beside the best peer of every size where there is one; of ours, plain grams alone."""
    shown = lambda row: "no peer" not in row[-1] and "weighted grams" not in row[6]
    table = parse(peers_page.goals(peer_results(sources)["reference"])).keep(shown)
    heads = {1: "best peer", 6: "ours", 11: "ratio", 12: "of KL", 13: "at most half"}
    return table.columns(0, 1, 3, 6, 8, 11, 12, 13, heads=heads).cells(_shorter)


def peer_results(sources: Sources) -> dict[str, Json]:
    """Comparisons with other tools by model, the rows of all files of a model together."""
    files = sources.folder("weight_peers").values()
    merged = peers_page.merged(file for file in files if "peers" in file["record"]["config"])
    return {result["record"]["config"]["model"]: result for result in merged}


SETTINGS = (
    "W8A8 dynamic",
    "W8A8 static, MSE",
    "W8A8 static, MSE, online",
    "W8A8 FP8 dynamic",
    "W4g32A8 dynamic",
    "W4g32A4 dynamic",
    "W4g32A4 dynamic, rotated",
    "W4g32A4 dynamic, online",
    "W4g32A4 dynamic, groups",
    "W4g32A4 dynamic, groups, online",
)
"""Settings of rounded activations in the paper's table, those that both of its models have."""


def rounded_activations(sources: Sources) -> Table:
    """What rounded activations cost two models: a row a setting, KL on the text and on the shifted one."""
    models = ("reference", "tiny1m")
    of_model = []
    for model in models:
        rows = parse(activations.table(sources.file(f"activations/{model}"))).rows
        of_model.append({_without_code(row[0]): row for row in rows})
    head = ("setting", *(f"{short}: {what}" for short in ("ref.", "tiny1m") for what in ("change", "KL", "shifted")))
    cells = lambda row: (row[2], row[3], row[6])
    rows = ((setting, *(cell for of in of_model for cell in cells(of[setting]))) for setting in SETTINGS)
    return Table(head, (False, *(True,) * 6), tuple(rows))


def asked(sources: Sources) -> Table:
    """What is asked of W8A8, and whether it holds."""
    texts = list(sources.folder("activations").values())
    return parse(activation_tables.asked(texts, list(sources.folder("activations/images").values())))


def corrected(sources: Sources) -> Table:
    """Biases and norms corrected behind rounded convolutions."""
    table = parse(corrections.table(sources.file("corrections/resnet20_cifar10"))).columns(0, 1, 2, 3, 6, 7)
    return table.keep(lambda row: "one scale" not in row[0] and row[0].split()[0] in ("W4", "W3", "W4A4")).cells(
        _without_code
    )


def trained(sources: Sources) -> Table:
    """What training recovers, of both models: the plans that were trained."""
    tables, heads = [], {2: "bpw", 3: "quality", 7: "recovered", 8: "of the best"}
    for name, result in sources.folder("qat").items():
        plans = {row["plan"] for row in result["rows"] if row["way"] == "trained"}
        table = parse(qat.table(result)).keep(lambda row, plans=plans: row[0] in plans)
        table = table.columns(0, 1, 2, 3, 4, 7, 8, heads=heads)
        tables.append(table.beside("model", [name.split("_")[0]] * len(table.rows)))
    return tables[0].above(*tables[1:])


def tpu(sources: Sources) -> Table:
    """Cycles that the newest libtpu estimates for few tokens, a row a format, a column a generation."""
    cycles = list(sources.file("kernels/tpu_cycles").values())[-1]["cycles"]
    cases = dict.fromkeys(case for of in cycles.values() for case in of if "-16x4096x4096-" in case)
    rows = tuple(
        (case.split("-")[0], *(f"{of[case]:,}" if of[case] else "–" for of in cycles.values())) for case in cases
    )
    return Table(("16 tokens, 4096 × 4096", *cycles), (False, *(True,) * len(cycles)), rows)


def llama_cpp(sources: Sources) -> Table:
    """KL of files for llama.cpp at equal bytes, two models."""
    tables = []
    for name in ("reference", "student"):
        table = parse(gguf.table(sources.file(f"gguf/{name}"))).cells(lambda cell: _shorter(cell.split(";")[0]))
        tables.append(table.beside("model", [name] * len(table.rows)))
    return tables[0].above(*tables[1:])


SHORTER = (
    (r"mpq, ", ""),
    (r"(?:with )?learned levels, rounded \(QEP\)", "learned levels, QEP"),
    (r"with codes along a trellis, rounded \(QEP\)", "trellis, QEP"),
    (r"codes along a trellis to choose from instead of learned levels, QEP", "codes along a trellis instead, QEP"),
    (r"allocated(?: and|,) rounded \(QEP\)", "allocated, QEP"),
    (r"(?:,| and) distilled in \d+ steps", ", distilled"),
    (r" on its own text", " on own text"),
    (r" by end-loss-weighted grams", ", weighted grams"),
    (r"the same plan, each weight making up for those before it \(QEP\)", "the same plan, QEP"),
    (r"largest uniform scheme that fits", "largest uniform scheme"),
    (r"schemes allocated instead, by Fisher", "allocated by Fisher, GPTQ"),
    (r"more schemes to choose from", "the same of more schemes"),
    (r", on varied text", ""),
    (r"llama.cpp's quantizer, importance matrix", "llama.cpp, importance matrix"),
    (r"its mix of types, rounded by GPTQ here", "its mix, GPTQ of ours"),
    (r"`mpq gguf`, embedding and output as in the mix", "searched, same ends"),
    (r"`mpq gguf`", "searched"),
)
"""What pages say, and how the paper's narrower tables say it."""


def _shorter(cell: str) -> str:
    for pattern, said in SHORTER:
        cell = re.sub(pattern, said, cell)
    return cell


def _without_code(cell: str) -> str:
    return cell.split(" (`")[0]


TABLES: Mapping[str, Callable[[Sources], Table]] = MappingProxyType(
    {
        "results": results,
        "tasks": tasks,
        "rounding": rounding,
        "ingredients": ingredients,
        "weight_peers": weight_peers,
        "activations": rounded_activations,
        "asked": asked,
        "corrected": corrected,
        "trained": trained,
        "tpu": tpu,
        "llama_cpp": llama_cpp,
        "runtimes": runtimes,
        "reproduce": reproduce,
    }
)
"""File name without suffix -> what draws it up."""
