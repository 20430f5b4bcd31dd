"""Tables of the page of rounded activations: images, time at run time, other libraries, and what is asked of W8A8."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.text import with_error

Result = Mapping[str, Any]
TEXT_LIMIT, IMAGE_LIMIT = 0.5, 0.3
"""Per cent of perplexity and points of top-1 that 8 bits may cost."""


def images(result: Result) -> str:
    """A row a setting and the images that its ranges are of: top-1 and KL on both test sets."""
    lines = [
        "| setting | ranges of | top-1 | change, points | KL, nats per image | shifted: top-1 | change | KL |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ranges = {None: "", "own": "own images"}.get(row["calibrated_on"], "shifted")
        cells = [f"{row['setting']} (`{row['plan']}`)", ranges]
        for name in ("own", "shifted"):
            kl, change = with_error(row[name]["kl"], row[name]["kl_stderr"]), points(result, row, name)
            cells += [f"{100 * row[name]['top1']:.2f} %", f"{change:+.2f}", kl]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def points(result: Result, row: Result, name: str) -> float:
    """Change of top-1 in points on one test set."""
    return 100 * (row[name]["top1"] - result["original"][name]["top1"])


def costs(results: Sequence[Result]) -> str:
    """A row a setting, two columns a model: the median of a batch, and that over the original's."""
    names = list(dict.fromkeys(row["setting"] for result in results for row in result["rows"]))
    models = [f"{of['record']['config']['model']}, {' x '.join(map(str, of['inputs'][:2]))}" for of in results]
    heads = " | ".join(f"{model}: ms | of the original" for model in models)
    lines = [f"| setting | {heads} |", "|---|" + "---:|" * (2 * len(results))]
    for name in names:
        cells = []
        for result in results:
            rows = {row["setting"]: row for row in result["rows"]}
            first = result["rows"][0]["seconds"]
            row = rows.get(name)
            cells += [f"{1000 * row['seconds']:.3g}", f"{row['seconds'] / first:.2f}"] if row else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peers(result: Result) -> str:
    """A row a setting of a peer and one of ours beside it, in bold the one that the calibration text chose."""
    lines = ["| theirs | perplexity | KL, nats per token | ours | perplexity | KL |", "|---|---:|---:|---|---:|---:|"]
    for row in result["rows"]:
        told = lambda of: [f"{of['perplexity']:.4g}", with_error(of["kl"], of["kl_stderr"])]
        for ours, of in row["ours"].items():
            name = f"**{ours}**" if ours == row.get("chosen") else ours
            lines.append("| " + " | ".join([row["peer"], *told(row["theirs"]), name, *told(of)]) + " |")
    return "\n".join(lines)


def files(result: Result) -> str:
    """A row a quantizer of ONNX Runtime: its file and ours."""
    lines = [
        "| onnxruntime's quantizer | bytes | KL, nats per token | same first choice | our bytes | KL | same |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [row["quantizer"].replace("_", " ")]
        for side in ("their", "our"):
            cells += [f"{row[f'{side}_bytes']:,}", with_error(row[f"{side}_kl"], row[f"{side}_kl_stderr"])]
            cells.append(f"{100 * row[f'{side}_agreement']:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def asked(texts: Sequence[Result], pictures: Sequence[Result]) -> str:
    """A row a model: W8A8 dynamic, and the static setting with the least KL, against the limits."""
    lines = ["| model | dynamic | change | static | change | asked | holds |", "|---|---|---:|---|---:|---:|---|"]
    for model, found, limit, unit in judged(texts, pictures):
        cells = [model]
        for name, change in found:
            cells += [name, f"{change:+.2f} {unit}"]
        worse = max((change if unit == "%" else -change) for _, change in found)
        lines.append(f"| {' | '.join(cells)} | {limit} {unit} | {'yes' if worse <= limit else 'no'} |")
    return "\n".join(lines)


Found = tuple[str, list[tuple[str, float]], float, str]
"""Model; settings and what they change; the limit of that; its unit."""


def judged(texts: Sequence[Result], pictures: Sequence[Result]) -> Iterator[Found]:
    """Of every model the settings of W8A8 with dynamic and with static scales that have the least KL.

    Of texts that on the held-out text, of images that on those to choose by, where all were judged on such.
    """
    yield from _texts(texts)
    yield from _images(pictures)


def _texts(results: Sequence[Result]) -> Iterator[Found]:
    for result in results:
        of = lambda row: (row["setting"], row["test"]["change_percent"])
        kl = lambda row: row["test"]["kl"]
        yield result["record"]["config"]["model"], _best(result["rows"], of, kl), TEXT_LIMIT, "%"


def _images(results: Sequence[Result]) -> Iterator[Found]:
    for result in results:
        rows = [row for row in result["rows"] if row["calibrated_on"] != "shifted"]
        of = lambda row, result=result: (row["setting"], points(result, row, "own"))
        by = "selection" if all("selection" in row for row in rows if row["setting"].startswith("W8A8")) else "own"
        kl = lambda row, by=by: row[by]["kl"]
        yield result["record"]["config"]["model"], _best(rows, of, kl), IMAGE_LIMIT, "points"


def _best(rows: Sequence[Result], of: Any, kl: Any) -> list[tuple[str, float]]:
    """Of W8A8 with a dynamic scale and with a static one in integers, what has the least KL."""
    kinds = ("W8A8 dynamic", "W8A8 static")
    return [of(min((row for row in rows if row["setting"].startswith(kind)), key=kl)) for kind in kinds]
