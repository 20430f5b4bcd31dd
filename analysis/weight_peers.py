"""`python -m analysis.weight_peers`: tables of `experiments.weight_peers` and `peer_folders`, from their results."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import pages
from analysis.text import significant, with_error

FOLDER = Path("experiments/results/weight_peers")
Result = Mapping[str, Any]

SPARE = 1.01
"""A peer may take so much more than a budget: sizes that its own search of bits ends at are not round."""
NEAR = 0.95
"""Share of a budget that a peer has to take for the two to be compared."""
GOAL = 0.5
"""Share of the best peer's excess loss that ours may leave."""

INGREDIENTS = {
    "uniform": "mpq, one scheme for all, GPTQ",
    "propagated": "mpq, allocated and rounded (QEP)",
    "propagated_varied": "mpq, allocated, rounded (QEP) and distilled in {} steps",
    "propagated_written": "mpq, allocated, rounded (QEP) and distilled in {} steps on its own text",
    "learned": "mpq, with learned levels, rounded (QEP)",
    "learned_varied": "mpq, with learned levels, rounded (QEP) and distilled in {} steps",
    "learned_written": "mpq, with learned levels, rounded (QEP) and distilled in {} steps on its own text",
    "guided": "mpq, with learned levels, rounded (QEP) by end-loss-weighted grams",
    "guided_varied": "mpq, with learned levels, rounded (QEP) by end-loss-weighted grams and distilled in {} steps",
    "guided_written": "mpq, with learned levels, rounded (QEP) by end-loss-weighted grams and distilled in {} steps "
    "on its own text",
    "trellis": "mpq, with codes along a trellis, rounded (QEP)",
    "trellis_written": "mpq, with codes along a trellis, rounded (QEP), scales distilled in {} steps on its own text",
    "guided_trellis": "mpq, with codes along a trellis, rounded (QEP) by end-loss-weighted grams",
}

STRONGEST = tuple(f"AutoRound W{bits}g32" for bits in (2, 3, 4))
"""Settings whose absence from a table has to be told: nothing else came near them where all were run."""


def best_peer(result: Result, budget: float) -> Mapping[str, Any] | None:
    """The peer that leaves the least excess loss on the text like the calibration text, of those that fit."""
    fits = lambda row: row["by"] == "peer" and 0 < (row.get("bits_per_weight") or 0) <= SPARE * budget
    return min(filter(fits, result["rows"]), key=lambda row: row["test"]["excess"], default=None)


def own(result: Result, budget: float, ingredient: str) -> Mapping[str, Any] | None:
    """Our row, if there is one."""
    wanted = (row for row in result["rows"] if (row.get("budget"), row.get("ingredient")) == (budget, ingredient))
    return next(wanted, None)


def goals(result: Result) -> str:
    """A row a budget and ingredient of ours: the best peer of the size, ours, and whether half of its excess is met."""
    lines = [
        "| budget | best peer | bpw | excess | KL | KL, other | ours | bpw | excess | KL | KL, other | excess, ratio "
        "| KL, ratio | at most half of the excess |",
        "|---:|---|" + "---:|" * 4 + "---|" + "---:|" * 6 + "---|",
    ]
    for budget in sorted({row["budget"] for row in result["rows"] if row["by"] == "mpq"}):
        for ingredient, what in INGREDIENTS.items():
            peer, ours = best_peer(result, budget), own(result, budget, ingredient)
            if peer is not None and ours is not None:
                excess, kl = (ours["test"][name] / peer["test"][name] for name in ("excess", "kl"))
                met = "yes" if excess <= GOAL else "**no**"
                if peer["bits_per_weight"] < NEAR * budget:
                    met = "no peer of this size"
                cells = [
                    peer["name"],
                    *_cells(peer),
                    what.format(ours["steps"]),
                    *_cells(ours),
                    f"{excess:.2f}",
                    f"{kl:.2f}",
                    met,
                ]
                lines.append(f"| {budget:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def everything(result: Result) -> str:
    """A row a setting: size, quality on both texts, seconds."""
    lines = [
        "| | bpw | KL | excess | same first choice | KL, other | excess, other | s | s of a processor |",
        "|---|" + "---:|" * 8,
    ]
    for row in sorted(filter(lambda row: "refused" not in row, result["rows"]), key=_order):
        test, other = row["test"], row["other"]
        name = row["name"]
        if row["by"] == "mpq":
            name = f"{INGREDIENTS[row['ingredient']].format(row['steps'])}, {row['budget']:g}"
        cells = [name, significant(row["bits_per_weight"], 4), with_error(test["kl"], test["kl_stderr"])]
        cells += [with_error(test["excess"], test["excess_stderr"]), f"{100 * test['agreement']:.1f} %"]
        cells += [with_error(other["kl"], other["kl_stderr"]), with_error(other["excess"], other["excess_stderr"])]
        cells += [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refused(result: Result) -> str:
    """What peers do not take, in their own words; empty if they take all."""
    rows = [row for row in result["rows"] if "refused" in row]
    return "\n".join(f"- {row['name']}: `{row['refused'][:160].replace('`', '')}`" for row in rows)


METHODS = {
    "theirs": "its own quantizer",
    "rtn": "mpq, nearest (no data)",
    "gptq": "mpq, GPTQ",
    "qep": "mpq, QEP",
    "guided": "mpq, QEP by end-loss-weighted grams",
    "distilled": "mpq, QEP and distilled in {} steps",
}


def folders(result: Result) -> str:
    """A row a case and method: bytes, KL and the runtime's time, beside those of what its own quantizer leaves."""
    lines = [
        "| runtime and format | made by | bytes | KL | over its own | less its own | excess | same first choice "
        "| KL, other | less its own | time over its own |",
        "|---|---|" + "---:|" * 9,
    ]
    rows = {(row["case"], row["method"]): row for row in result["rows"] if "refused" not in row}
    for case in dict.fromkeys(case for case, _ in rows):
        for method, what in METHODS.items():
            if (row := rows.get((case, method))) is not None:
                test, other, theirs = row["test"], row["other"], rows.get((case, "theirs"))
                ratio = "" if theirs is None else f"{test['kl'] / theirs['test']['kl']:.2f}"
                cells = [f"{case} (`{row['scheme']}`)", what.format(row["steps"]), f"{row['bytes']:,}"]
                cells += [with_error(test["kl"], test["kl_stderr"]), ratio, _change(test)]
                cells += [with_error(test["excess"], test["excess_stderr"]), f"{100 * test['agreement']:.1f} %"]
                cells += [with_error(other["kl"], other["kl_stderr"]), _change(other)]
                cells.append(f"{row['time_ratio']:.2f}" if "time_ratio" in row else "")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(of: Mapping[str, Any]) -> str:
    return with_error(of["kl_change"], of["kl_change_stderr"]) if "kl_change" in of else ""


def times(result: Result) -> str:
    """A row a model: what `mpq run` took, and on what it spent it."""
    lines = [
        "| model | budget | cores | s | s of a processor | compiling | tracing and lowering | stages, s | KL |",
        "|---|---|" + "---:|" * 5 + "---|---:|",
    ]
    for row in result["rows"]:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["stages"].items())
        kl = ", ".join(with_error(plan["kl"], plan.get("kl_stderr")) for plan in row["plans"].values())
        shares = (100 * part / row["seconds"] for part in (row["compiled"], row["traced"] + row["lowered"]))
        cells = [row["model"], row["budget"], str(row["cores"]), f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}"]
        lines.append("| " + " | ".join([*cells, *(f"{share:.0f} %" for share in shares), stages, kl]) + " |")
    return "\n".join(lines)


def merged(results: Iterable[Result]) -> list[Result]:
    """One result a model: the rows of all its files, which differ in the environment of the peers alone."""
    steps = lambda result: {"steps": result["record"]["config"]["steps"]}
    return pages.merged(({**r, "rows": [{**steps(r), **row} for row in r["rows"]]} for r in results), "model")


def page(results: Sequence[Result]) -> str:
    """Every model."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Sequence[Result]) -> Iterator[str]:
    yield "# Weights rounded by other tools, beside ours"
    yield (
        "Written by `python -m analysis.weight_peers` from the files beside it; `experiments/weight_peers.py` says how "
        "they are made. Same model, windows, calibration text and way of counting bits: codes, scales and zero points "
        "of the linear weights of the blocks. KL is to the original, the excess is the rise of the loss, both in nats "
        "per token, on text like the calibration text and, where it says other, on another domain's; standard errors "
        f"over windows. The best peer of a size leaves the least excess and takes at most {100 * (SPARE - 1):.0f} % "
        "more bits than the budget; where it takes over 5 % fewer, nothing is claimed. Codes along a trellis and "
        "learned levels run here and in programs of PyTorch; formats of peers have kernels, too. The machine did other "
        "work beside: seconds of a processor are the fairer ones."
    )
    for result in merged(result for result in results if "peers" in result["record"]["config"]):
        yield f"## {result['record']['config']['model']}"
        yield f"{_texts(result)} {_versions(result)}"
        yield goals(result)
        if missing := [name for name in STRONGEST if name not in {row["name"] for row in result["rows"]}]:
            yield f"Not run: {', '.join(missing)}; the best peer of those sizes may be better than the one above."
        if left := [row["name"] for row in result["rows"] if (row.get("bits_per_weight") or 0) > 8]:
            yield f"Left most weights in the 16 bits that they had, for their shape: {', '.join(left)}."
        yield "All settings:"
        yield everything(result)
        if said := refused(result):
            yield "What peers did not take, in their own words:"
            yield said
    for result in merged(result for result in results if "cases" in result["record"]["config"]):
        yield f"## Checkpoints of {result['record']['config']['model']}, each run by the runtime that reads both"
        yield (
            f"{_texts(result)} Written by `experiments/peer_folders.py`: one format for all weights of the blocks, the "
            f"rest in float32, so that what differs is which codes and scales are chosen within it. bitsandbytes sees "
            f"no data. Differences of KL are paired by window. Times are those of the runtime for a batch of ours over "
            f"its own folder, both in one run in turns on one thread: it runs the same code on both, so what differs "
            f"from 1 is noise. {_versions(result)}"
        )
        yield folders(result)
    for result in (result for result in results if "settings" in result["record"]["config"]):
        yield "## From the first import to the report"
        yield (
            "`mpq run` with one metric, one budget and one rounding algorithm "
            "(`experiments/end_to_end.py`); seconds of a processor leave out what other programs took of it. Those of "
            "peers above are of quantizing alone, without imports, evaluation and report."
        )
        yield times(result)


def _texts(result: Result) -> str:
    config, perplexity = result["record"]["config"], result["perplexity"]
    return (
        f"Perplexity of the original {perplexity['test']:.4f} on `{config['test']}`, {perplexity['other']:.1f} on "
        f"`{config['other']}`; {config['windows']} windows of {config['window']} tokens of each, and of "
        f"`{config['data']}` to calibrate on."
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    test, other = row["test"], row["other"]
    texts = [with_error(test[name], test[f"{name}_stderr"]) for name in ("excess", "kl")]
    return [f"{row['bits_per_weight']:.3f}", *texts, with_error(other["kl"], other["kl_stderr"])]


def _order(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    return row["by"] == "mpq", row["bits_per_weight"] or 0, row["name"]


def _versions(result: Result) -> str:
    found = {name: v for row in result["rows"] for name, v in row.get("versions", {}).items()}
    return "Peers: " + ", ".join(f"{name} {found[name]}" for name in sorted(found, key=str.lower)) + "."


def main() -> int:
    """Write the page."""
    return pages.write_page(FOLDER, page)


if __name__ == "__main__":
    sys.exit(main())
