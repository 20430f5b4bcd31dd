"""The tables of the paper: those of the pages of results, with fewer rows and columns, and two of its own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from analysis import activation_tables, activations, bit_search, codebooks, corrections, distillation, gguf, qat, readme
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
    table = parse(codebooks.rounding(sources.file("codebooks/reference"), "blocks"))
    return table.columns(0, 1, 2, 3, 4, heads={1: "bpw"})


def ingredients(sources: Sources) -> Table:
    """KL of plans of five budgets, an ingredient a row."""
    return parse(distillation.table(sources.file("distillation/tiny1m"), "kl"))


def weight_peers(sources: Sources) -> Table:
    """The reference model beside the best peer of every size where there is one."""
    table = parse(peers_page.goals(peer_results(sources)["reference"])).keep(lambda row: "no peer" not in row[-1])
    said = lambda text: text.removeprefix("mpq, ").replace("end-loss-weighted grams", "weighted grams")
    return table.columns(0, 1, 3, 6, 8, 11, 12, 13, heads={13: "at most half"}).cells(said)


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
    head = ("setting", *(f"{model}: {what}" for model in models for what in ("change", "KL", "KL, shifted")))
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
    return table.keep(lambda row: "equalized" not in row[1] and "one scale" not in row[0]).cells(_without_code)


def trained(sources: Sources) -> Table:
    """What training recovers, of both models."""
    tables = []
    for name, result in sources.folder("qat").items():
        table = parse(qat.table(result)).columns(0, 1, 2, 3, 4, 7, 8, heads={2: "bpw", 3: "quality"})
        tables.append(table.beside("model", [name.split("_")[0]] * len(table.rows)))
    return tables[0].above(*tables[1:])


def widths(sources: Sources) -> Table:
    """Bit widths by gradient, against the exact solver."""
    return parse(bit_search.table(sources.file("bit_search/stories260k"))).columns(0, 1, 2, 3, 4, 5)


def tpu(sources: Sources) -> Table:
    """Cycles that the newest libtpu estimates, a row a case, a column a generation."""
    cycles = list(sources.file("kernels/tpu_cycles").values())[-1]["cycles"]
    cases = dict.fromkeys(case for of in cycles.values() for case in of)
    rows = tuple(
        (case.removesuffix("-bfloat16"), *(f"{of[case]:,}" if of[case] else "–" for of in cycles.values()))
        for case in cases
    )
    return Table(("case: format, tokens x rows x columns", *cycles), (False, *(True,) * len(cycles)), rows)


def llama_cpp(sources: Sources) -> Table:
    """KL of files for llama.cpp at equal bytes, two models."""
    tables = []
    for name in ("reference", "student"):
        table = parse(gguf.table(sources.file(f"gguf/{name}"))).cells(lambda cell: cell.split(";")[0])
        tables.append(table.beside("model", [name] * len(table.rows)))
    return tables[0].above(*tables[1:])


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
        "widths": widths,
        "tpu": tpu,
        "llama_cpp": llama_cpp,
        "runtimes": runtimes,
        "reproduce": reproduce,
    }
)
"""File name without suffix -> what draws it up."""
