"""`python -m analysis.activations [FOLDER]`: the table of `experiments/activations.py`, from its committed results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from analysis import activation_tables as tables
from analysis.pages import results_in, write_page
from analysis.text import with_error

FOLDER = Path("experiments/results/activations")
BESIDE = ("images", "cost", "peers", "onnx")
"""Folders beside the results, of the experiments that the page is drawn from too."""

Result = Mapping[str, Any]


def table(result: Result) -> str:
    """A row a setting: perplexity, its change and the KL, on the text and on the shifted one."""
    lines = [
        "| setting | perplexity | change | KL, nats per token | shifted: perplexity | change | KL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        changed = [
            word for key, word in (("rotate", "rotated"), ("smooth", "smoothed"), ("turn", "online")) if row.get(key)
        ]
        cells = [" ".join([f"`{row['plan']}`", *changed])]
        for text in ("test", "shifted"):
            of = row[text]
            kl = with_error(of["kl"], of["kl_stderr"])
            cells += [f"{of['perplexity']:.4g}", f"{of['change_percent']:+.2f} %", kl]
        lines.append(f"| {row['setting']} ({cells[0]}) | " + " | ".join(cells[1:]) + " |")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """A row a setting that two models have or the only one, kinds of bits together; a column a model."""
    names = [{row["setting"]: row for row in result["rows"]} for result in results]
    every = dict.fromkeys(name for rows in names for name in rows)
    shared = [name for name in every if sum(name in rows for rows in names) >= min(2, len(names))]
    shared.sort(key=lambda name: name.replace(",", " ").split()[:2])
    models = [result["record"]["config"]["model"] for result in results]
    lines = ["| setting | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for name in shared:
        cells = [
            " / ".join(f"{rows[name][text]['change_percent']:+.2f}" for text in ("test", "shifted") if name in rows)
            for rows in names
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rotations(results: Sequence[Result]) -> str:
    """A row a setting that a model has rotated, offline or online, and not: the KL without and with."""
    lines = ["| model | setting | KL without | with | shifted: without | with |", "|---|---|---:|---:|---:|---:|"]
    for result in results:
        rows = {row["setting"]: row for row in result["rows"]}
        for name, row in rows.items():
            plain = rows.get(name.replace(", rotated", "").replace(", online", ""))
            if (row.get("rotate") or row.get("turn")) and plain is not None:
                cells = [
                    with_error(of[t]["kl"], of[t]["kl_stderr"]) for t in ("test", "shifted") for of in (plain, row)
                ]
                lines.append(f"| {result['record']['config']['model']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: Sequence[Result], beside: Mapping[str, Sequence[Result]] = MappingProxyType({})) -> str:
    """Every model; and of `BESIDE`, what there is."""
    return "\n\n".join((*_parts(results), *_beside(results, beside))) + "\n"


def _beside(results: Sequence[Result], beside: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    pictures, times, peers, files = (beside.get(name, ()) for name in BESIDE)
    if pictures:
        yield "## Images"
        yield (
            "Ranges of the classifier's own images and of shifted ones (JPEG), judged on both. Weights of 8 bits by "
            "rounding to nearest, of 4 by GPTQ; all weights and inputs. Corrected: 8 bits by GPTQ, biases and norms "
            "for what all rounding does on average, as `mpq run` has it. Made by `experiments/image_activations.py`; "
            "standard errors over images."
        )
        for result in pictures:
            config, before = result["record"]["config"], result["original"]
            yield f"### {config['model']}"
            yield (
                f"Top-1 of the original {100 * before['own']['top1']:.2f} % on {config['test']} images, "
                f"{100 * before['shifted']['top1']:.2f} % on {config['shifted']} shifted ones; {config['calibration']} "
                "to calibrate on."
            )
            yield tables.images(result)
    if times:
        yield "## Time at run time"
        yield (
            "One batch through `mpq.packed`, each setting one compiled program with packed weights; the original in "
            "float32. Medians of runs in turns on a CPU that did other things too: ratios mean more than times. "
            "Made by `experiments/activation_cost.py`."
        )
        yield tables.costs(times)
    if peers:
        yield "## Beside other libraries"
        yield (
            "The same model, windows, calibration text, bits and granularity of scales; the blocks of the decoder "
            "alone; in bold, which of ours has the least KL on the calibration text. Made by "
            "`experiments/activation_peers.py`, which says what each is."
        )
        for result in peers:
            versions = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
            model = result["record"]["config"]["model"]
            yield f"{model}: perplexity {result['perplexity']:.4f} in float32. {versions}."
            yield tables.peers(result)
    if files:
        yield "## Beside ONNX Runtime"
        yield (
            "Files that onnxruntime's own quantizer makes of the same model and calibration text beside ours, about as "
            "large, both run in that runtime on the same windows as above; all matmuls, the head too. Made by "
            "`experiments/runtimes_w8a8.py`, which says what each is."
        )
        for result in files:
            yield f"{result['record']['config']['model']}:"
            yield tables.files(result)
    if pictures or times or peers:
        yield "## What is asked of W8A8"
        yield (
            f"At most {tables.TEXT_LIMIT} % of perplexity more, and {tables.IMAGE_LIMIT} points of top-1 less, on the "
            "held-out set; of each kind the setting with the least KL: on that set, or, where "
            "images to choose by are at hand, on those, which nothing else saw."
        )
        yield tables.asked(results, pictures)


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# What rounded activations cost"
    yield (
        "Written by `python -m analysis.activations` from the files beside it; `experiments/activations.py` says how "
        "they are made. Ranges, smoothing and rotation come from the calibration text alone; neither of the two others "
        "was seen by any stage. Standard errors over windows."
    )
    for result in results:
        config, before = result["record"]["config"], result["perplexity"]
        yield f"## {config['model']}"
        yield (
            f"Perplexity of the original {before['test']:.4f} on {config['test']}, {before['shifted']:.4g} on "
            f"{config['shifted']}; {config['windows']} windows of {config['window']} tokens each. Weights whose path "
            f"holds `{config['only']}`, and what they read; the others stay in floating point."
        )
        yield table(result)
    yield "## Dynamic or static, which when"
    yield (
        "The change of perplexity in per cent, on the text and on the shifted one. A dynamic scale needs no "
        "calibration and costs a pass over the values for their largest; a static one is calibrated "
        "and costs no such pass."
    )
    yield summary(results)
    yield "## Rotated or not"
    yield (
        "The same plan without and with rotation. `rotated` is the model, folded into its weights "
        "(`mpq/equalize/rotate.py`: the residual stream and the values of heads); `online` are inputs where they are "
        "rounded, those for which it helps (`mpq/activations/turn.py`)."
    )
    yield rotations(results)


def main(arguments: Sequence[str] = ()) -> int:
    """Write the page of the folder that is named, or of `FOLDER`."""
    folder = Path(arguments[0]) if arguments else FOLDER
    beside = {name: results_in(folder / name) for name in BESIDE}
    return write_page(folder, lambda results: page(results, beside))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
