"""`python -m analysis.qat`: the tables of `experiments/qat.py`, from its committed results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pages import write_page
from analysis.text import with_error

FOLDER = Path("experiments/results/qat")
Result = Mapping[str, Any]

PUBLISHED = """Published, not measured here, on all 10,000 test images: APoT (Li et al. 2020, arXiv:1909.13144), top-1 \
of ResNet-20 on CIFAR-10 by the table of checkpoints in its authors' repository `yhhhli/APoT_Quantization`: 92.96 % in \
floating point, 92.45 % at W4A4, 92.49 % at W3A3, 90.96 % at W2A2, each trained from the one before. That is from \
another float model, which these are .51, .47 and 2.00 points below, on the exact training images and with their \
labels; here training sees JPEG copies of them and no label, and 932 images tell .9 points apart. HAWQ-V3 (Yao et al. \
2021, arXiv:2011.10680) tells of ResNet-18, ResNet-50 and Inception-V3; of LSQ and BRECQ no \
figure for ResNet-20 on CIFAR-10 was found."""


def table(result: Result) -> str:
    """A row a plan and way of making it, and what share of the loss of the best rounding is recovered."""
    lines = [
        f"| plan | way | bits per weight | {result['quality_name']} | KL to the original | rise of the loss | s | "
        "recovered of GPTQ's loss | of the best rounding's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        shares = recovered(result, row["plan"]) if row["way"] == "trained" else (None, None)
        cells = [
            row["plan"],
            row["way"],
            f"{row['bits_per_weight']:.3f}",
            _quality(result, row["quality"]),
            with_error(row["kl"], row["kl_stderr"]),
            with_error(row["excess"], row["excess_stderr"]),
            f"{row['seconds']:.0f}",
            *("" if share is None else f"{100 * share:.0f} %" for share in shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recovered(result: Result, plan: str) -> tuple[float | None, float | None]:
    """The shares of what plain and the best rounding of a plan lose that training takes back; None where it is nothing.

    Of accuracies, points of top-1; of anything else, the rise of the loss.
    """
    rows = [row for row in result["rows"] if row["plan"] == plan]
    if result["quality_name"] == "accuracy":
        lost = [result["quality"] - row["quality"] for row in rows]
    else:
        lost = [row["excess"] for row in rows]
    *rounded, trained = lost
    share = lambda loss: None if loss <= 0 else 1 - trained / loss
    return share(rounded[0]), share(min(rounded))


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# What quantization-aware training recovers"
    yield (
        "Written by `python -m analysis.qat` from the files beside it; `experiments/qat.py` says how they are made. "
        "Every plan is rounded, rounded better, and trained from there to the outputs of the original, in the same "
        "bytes; seconds are those of each way alone, more where the machine did other work. Recovered is the share of "
        "what rounding loses, in points of top-1 or in nats, that training takes back. Test data that no stage saw; "
        "standard errors over documents."
    )
    for result in results:
        config, settings = result["record"]["config"], result["distill"]
        yield f"## {config['model']}"
        yield (
            f"The original: {result['quality_name']} {_quality(result, result['quality'])}. Trained on "
            f"`{config['train']}`, {settings['steps']} steps of {settings['batch_size']}, on {result['cores']} core"
            f"{'s' if result['cores'] != 1 else ''}."
        )
        yield table(result)
        if result["quality_name"] == "accuracy":
            yield PUBLISHED


def _quality(result: Result, value: float) -> str:
    return f"{100 * value:.2f} %" if result["quality_name"] == "accuracy" else f"{value:.3f}"


def main() -> int:
    """Write the page."""
    return write_page(FOLDER, page)


if __name__ == "__main__":
    sys.exit(main())
