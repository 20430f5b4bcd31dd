"""Numbers of kernels, of files in other runtimes and of whole runs, as macros of the paper."""

from collections.abc import Sequence

from analysis.paper_figures import h200_speedups
from analysis.paper_sources import Json, Sources, only
from analysis.text import significant, with_error

WEIGHTS = ("w2a16_g128", "w4a16_g128", "w4a16_g32", "w8a16_channel", "nf4a16_g128")
INTEGERS = ("w8a8_channel", "w4a8_g128", "w4a8_g32")
FEW, MIDDLE, MANY, MANY_ON_CPU = 16, 256, 2048, 512
"""Numbers of tokens that the text speaks of."""


def kernels(sources: Sources) -> dict[str, str]:
    """How many times as fast as a dense dot."""
    rows, chained = (
        [row for row in sources.file(f"kernels/{file}")["rows"] if row["backend"] == "native"]
        for file in ("cpu", "cpu_chained")
    )
    card = h200_speedups(sources)
    at = lambda name, tokens: f"{dict(card[name])[tokens]:.2f}"
    shapes = [row for row in sources.file("kernels/h200")["rows"] if row["backend"] != "dense_bfloat16"]
    compiled = sources.file("kernels/h200_compiled")["kernels"].values()
    limits = sources.file("kernels/h200")["ceilings"]
    return {
        "CpuOne": _span(rows, (*WEIGHTS, *INTEGERS), 1),
        "CpuChained": _span(chained, (*WEIGHTS, *INTEGERS), 1),
        "CpuManyWeights": _span(rows, WEIGHTS, MANY_ON_CPU),
        "CpuManyIntegers": _span(rows, INTEGERS, MANY_ON_CPU),
        "CpuMany": str(MANY_ON_CPU),
        "CardFewTokens": str(FEW),
        "CardMiddleTokens": str(MIDDLE),
        "CardManyTokens": f"{MANY:,}",
        "CardFew": at("w4a16_g128", FEW),
        "CardFewRoofline": f"{_roofline(shapes, 'w4a16_g128', FEW):.0f} %",
        "CardMiddle": at("w4a16_g128", MIDDLE),
        "CardIntegers": at("w8a8_channel", MANY),
        "CardFourIntegers": at("w4a8_g128", MANY),
        "CardBandwidth": f"{limits['bytes_per_s'] / 1e12:.2f}",
        "CardForms": str(sources.file("kernels/h200_parts")["conformance"]["forms"]),
        "CardKernels": str(len(compiled)),
        "CardSpills": str(sum(kernel["spill_bytes"] > 0 for kernel in compiled)),
    }


def _span(rows: Sequence[Json], formats: Sequence[str], tokens: int) -> str:
    wanted = [row for row in rows if (row["m"], row["shape"]) == (tokens, "4096x4096") and row["format"] in formats]
    ratios = [row["speedup"] for row in wanted]
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def _roofline(rows: Sequence[Json], name: str, tokens: int) -> float:
    wanted = [row for row in rows if (row["format"], row["m"], row["shape"]) == (name, tokens, "8192x57344")]
    return min(wanted, key=lambda row: row["p50"])["roofline_percent"]


def files(sources: Sources) -> dict[str, str]:
    """KL and time of files in other runtimes, and the time of a whole run."""
    lower = [row["mpq"]["lower_by_percent"] for of in sources.folder("gguf").values() for row in of["rows"]]
    quantizers = sources.file("runtimes/reference")["rows"]
    weights = [row["our_kl"] / row["their_kl"] for row in quantizers]
    w8a8 = [
        row for model in ("reference", "resnet20_cifar10") for row in sources.file(f"runtimes/w8a8_{model}")["rows"]
    ]
    times = [row["our_seconds"] / row["their_seconds"] for row in w8a8]
    lite = [row for of in sources.folder("litert").values() for row in of["rows"]]
    loaded = sources.file("runtimes/gptqmodel")["rows"]
    served = sources.file("runtimes/vllm")["rows"]
    run = only(sources.file("weight_peers/times")["rows"], model="reference")
    tiny = only(sources.file("weight_peers/times")["rows"], model="tiny1m")
    bits = sources.file("weight_peers/checkpoints_reference")["rows"]
    same = next(row for row in bits if row["case"] == "bitsandbytes NF4" and row["method"] == "qep")
    theirs = next(row for row in bits if row["case"] == "bitsandbytes NF4" and row["method"] == "theirs")
    return {
        "GgufCases": str(len(lower)),
        "GgufLowest": f"{min(lower):.0f} %",
        "GgufHighest": f"{max(lower):.0f} %",
        "OnnxLow": f"{min(weights):.2f}",
        "OnnxHigh": f"{max(weights):.2f}",
        "OnnxTimes": f"{min(times):.2f}–{max(times):.2f}",
        "LiteCases": str(len(lite)),
        "LiteLower": str(sum(row["our_kl"] < row["their_kl"] for row in lite)),
        "LiteSlowest": f"{max(row['time_ratio'] for row in lite):.1f}",
        "LoadedForms": str(len(loaded)),
        "LoadedKl": significant(max(row["kl"] for row in loaded), 1),
        "LoadedAgreement": f"{100 * min(row['agreement'] for row in loaded):.2f} %",
        "ServedWeights": significant(max(row["kl"] for row in served if not _rounds_inputs(row)), 1),
        "ServedInputs": significant(max(row["kl"] for row in served if _rounds_inputs(row)), 1),
        "FolderRatio": f"{same['test']['kl'] / theirs['test']['kl']:.2f}",
        "RunTinySeconds": f"{tiny['seconds']:.0f}",
        "RunSeconds": f"{run['seconds']:.0f}",
        "RunCompiling": f"{100 * run['compiled'] / run['seconds']:.0f} %",
        "RunBits": str(run["budget"]).removesuffix("bpw"),
        "FolderKl": with_error(same["test"]["kl"], same["test"]["kl_stderr"]),
    }


def _rounds_inputs(row: Json) -> bool:
    return "W8A8" in row["plan"]
