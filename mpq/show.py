"""Terminal tables for a person: the same plain results that `--json` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table


def written(body: dict[str, Any], console: Console) -> None:
    """What was written where; warnings one a line."""
    console.print("  ".join(f"{key} {_text(value)}" for key, value in body.items() if key != "warnings"))
    _warnings(body, console)


def _warnings(body: dict[str, Any], console: Console) -> None:
    for warning in body.get("warnings", []):
        console.print(f"warning: {warning}", markup=False)


def ranges(body: dict[str, Any], console: Console) -> None:
    """What every row's values were, and the ranges that schemes take."""
    folding = [Column(name, overflow="fold") for name in ("row", "values seen", "later half", *body["schemes"])]
    rows = Table(*folding, title="ranges of activations")
    for row in body["rows"]:
        seen = f"{row['low']:.3g} .. {row['high']:.3g}"
        change = "" if row["change"] is None else f"{round(100 * row['change']):+d} %"
        rows.add_row(row["path"], seen, change, *(_ends(row["ends"].get(scheme)) for scheme in body["schemes"]))
    console.print(rows)
    counts = [row["values"] for row in body["rows"]], [row["windows"] for row in body["rows"]]
    told = [f"{min(n):,}" if min(n) == max(n) else f"{min(n):,} to {max(n):,}" for n in counts]
    console.print(f"{told[0]} values a row, of {told[1]} windows")
    _warnings(body, console)
    if body["out"] is not None:
        console.print(f"written to {body['out']}")


def _ends(ends: list[list[float]] | None) -> str:
    """One range, or the widest of several heads."""
    if ends is None:
        return ""
    of = f" ({len(ends[0])} heads)" if len(ends[0]) > 1 else ""
    return f"{min(ends[0]):.3g} .. {max(ends[1]):.3g}{of}"


def table(body: dict[str, Any], console: Console) -> None:
    """Predicted loss increase, one row a weight."""
    rows = Table("weight", *body["schemes"], title=f"predicted loss increase, nats per token ({body['metric']})")
    for path, values, errors in zip(body["weights"], body["loss_increase"], body["stderr"], strict=True):
        rows.add_row(path, *(_with_error(v, e) for v, e in zip(values, errors, strict=True)))
    console.print(rows)
    if "windows_run" in body:
        run, of_all = body["windows_run"], body["windows_of_all"]
        console.print(f"raced: {run:,} windows ran, {100 * run / of_all:.0f} % of the {of_all:,} of the whole table")
    console.print(f"written to {body['out']}")


def interactions(body: dict[str, Any], console: Console) -> None:
    """The pairs of weights whose errors go together most."""
    rows = Table("weight", "weight", "largest |correlation|", title="interactions, shrunk")
    for pair in body["strongest"]:
        rows.add_row(*pair["weights"], f"{pair['correlation']:.3f}")
    console.print(rows)
    console.print(f"correlations are shrunk by {100 * body['shrinkage']:.0f} %; written to {body['out']}")


def activations(body: dict[str, Any], console: Console) -> None:
    """Predicted loss increase, one row an activation; below it the bytes of all rows under each scheme."""
    schemes = body["schemes"]
    rows = Table(
        Column("activation", overflow="fold"),
        "values per token",
        *schemes,
        title=f"predicted loss increase, nats per output ({body['metric']})",
    )
    for path, size, values, errors in zip(
        body["activations"], body["values_per_token"], body["loss_increase"], body["stderr"], strict=True
    ):
        rows.add_row(path, f"{size:,}", *(_with_error(v, e) for v, e in zip(values, errors, strict=True)))
    rows.add_section()
    total = [sum(column) for column in zip(*body["bytes_per_token"], strict=True)]
    rows.add_row("bytes per token", "", *(f"{size:,.6g}" for size in total))
    console.print(rows)
    console.print(f"written to {body['out']}")


def plan(body: dict[str, Any], console: Console) -> None:
    """One plan, and the choice of every weight."""
    rows = Table(
        "weight",
        "scheme",
        title=f"{body['name']}: {body['size_bytes']:,} bytes, {body['bits_per_weight']:.4f} bits per weight",
    )
    unsure, share = body["stability"]["unsure"], body["stability"]["share"]
    for path, scheme in body["choices"].items():
        rows.add_row(path, f"{scheme} ≈ ({100 * share[path]:.0f} %)" if path in unsure else scheme)
    if beside := body.get("activations"):
        rows.add_section()
        for path, row in beside.items():
            rows.add_row(f"{path} ({'cache' if row['kind'] == 'kv' else 'input'})", row["scheme"])
    console.print(rows)
    if body.get("cache_bytes"):
        console.print(f"KV cache: {body['cache_bytes']:,} bytes")
    console.print(f"{'≈: ' if unsure else ''}{body['stability']['statement']}", markup=False)
    for rule, paths in body["matched"].items():
        console.print(f"{rule} matched {len(paths)}: {', '.join(paths)}", markup=False)
    for limit in body["limits"]:
        console.print(f"{limit['name']} {limit['reached']:,} of at most {limit['limit']:,} {limit['unit']}")
    for path in body["rules"]:
        console.print(f"rules written to {path}", markup=False)
    console.print(
        f"predicted loss increase {_with_error(body['predicted_kl'], body['predicted_stderr'])} nats per token, "
        f"lower bound {body['lower_bound']:.4g} (gap {body['gap']:.2g}), {body['status']}; written to {body['out']}"
    )


def evaluation(body: dict[str, Any], console: Console) -> None:
    """Quality of one model."""
    keys = list(body)
    quality, agreement = keys[0], keys[keys.index("kl_stderr") + 1]
    rows = Table("measure", "value", title="held-out quality")
    rows.add_row(quality, _with_error(body[quality], body[f"{quality}_stderr"]))
    if body["nll"] is not None:
        rows.add_row("nll, nats", _with_error(body["nll"], body["nll_stderr"]))
    if body["kl"] is not None:
        rows.add_row("KL to reference, nats", _with_error(body["kl"], body["kl_stderr"]))
        rows.add_row(_spelled(agreement), _with_error(body[agreement], body[_stderr(agreement)]))
    rows.add_row("documents, outputs", f"{body['num_documents']}, {body['num_outputs']:,}")
    rows.add_row("size", f"{body['size_bytes']:,} bytes, {body['bits_per_weight']:.4f} bits per weight")
    console.print(rows)


def run(body: dict[str, Any], console: Console) -> None:
    """All plans of a run, and what mixing bought."""
    result = body["results"]
    test, task = result["data"]["test"], result["task"]
    quality = result["reference"][task["quality"]]
    console.print(
        f"{test['num_documents']} held-out documents, {test['num_outputs']:,} {task['unit']}s; original: "
        f"{result['model']['reference_size_bytes'] / 1e6:.2f} MB"
        + ("" if quality is None else f", {task['quality']} {quality:.4g}")
    )
    for method in dict.fromkeys(p["method"] for p in result["plans"]):
        console.print(_plans_table(method, task, [p for p in result["plans"] if p["method"] == method]))
        console.print()
    console.print("* wins its budget on the selection set; of the ways to make its weights the best is handed out\n")
    for c in result["comparisons"]:
        console.print(f"{c['method']:>5}  {verdict(c)}")
    for budget, winner in result["winners"].items():
        handed_out = next(p for p in result["plans"] if p["handed_out"] and p["name"] == winner["plan"])
        console.print(f"{budget}: {_ending(winner)}; {_prediction(handed_out)}", markup=False)
        if len(winner["ways_kl"]) > 1:
            console.print(_made(winner), markup=False)
    if steady := result.get("ranges"):
        console.print(_steadiness(steady), markup=False)
        _warnings(result, console)
    console.print(f"run folder: {body['run']}  (report.html, frontier.png, plan.json, quantized/)")


def _steadiness(rows: list[dict[str, Any]]) -> str:
    """How the static ranges of a run hold between the halves of its calibration set."""
    changes = [(abs(row["change"]), row) for row in rows if row["change"] is not None]
    told = f"{len(rows)} static ranges of activations, from {min(row['windows'] for row in rows)} windows"
    if not changes:
        return f"{told}: too few to compare halves"
    most = max(changes, key=lambda pair: pair[0])[1]
    return f"{told}; between the halves of those {most['path']} changes most, by {round(100 * most['change']):+d} %"


def gguf(body: dict[str, Any], console: Console) -> None:
    """What was considered for a file, and what was written."""
    columns = ("plan", "bytes", "KL predicted", "KL on the selection set", "types")
    rows = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    rows.title, rows.columns[1].justify = f"within {body['budget_bytes']:,} bytes, nats per token", "right"
    for row in body["plans"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["types"].items(), key=lambda item: -item[1]))
        predicted = "" if row["predicted_kl"] is None else _with_error(row["predicted_kl"], row["predicted_stderr"])
        kl = _with_error(row["selection_kl"], row["selection_stderr"])
        style = "bold" if row["plan"] == body["plan"] else ""
        rows.add_row(row["plan"], f"{row['file_bytes']:,}", predicted, kl, kinds, style=style)
    console.print(rows)
    console.print(_made(body), markup=False, highlight=False)
    measured = body["measured"]
    console.print(
        f"{body['plan']} is written to {body['out']}: {body['size_bytes']:,} bytes, {body['bits_per_weight']:.3f} bits "
        f"per weight; read back, on unseen text: KL {_with_error(measured['kl'], measured['kl_stderr'])} nats per "
        f"token, same top-1 {100 * measured['top1_agreement']:.1f} %",
        markup=False,
        highlight=False,
    )
    if rival := body.get("rival"):
        difference = _with_error(rival["difference"], rival["stderr"])
        share = f"{100 * rival['difference'] / rival['kl']:+.0f} %"
        console.print(
            f"{rival['plan']}, rounded alike, has KL {rival['kl']:.4g} there: a difference of {difference} ({share})"
        )


def _plans_table(method: str, task: dict[str, str], plans: list[dict[str, Any]]) -> Table:
    quality, agreement = task["quality"], task["agreement"]
    columns = ("plan", "bpw", "MB", "KL, nats", "±", quality, _spelled(agreement))
    rows = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    rows.title = f"rounded by {method}"
    for column in rows.columns[1:]:
        column.justify = "right"
    for p in sorted(plans, key=lambda p: (p["bits_per_weight"], p["kind"])):
        rows.add_row(
            p["name"] + (" *" if p["handed_out"] else ""),
            f"{p['bits_per_weight']:.3f}",
            f"{p['size_bytes'] / 1e6:.3f}",
            f"{p['kl']:.5f}",
            "" if p["kl_stderr"] is None else f"{p['kl_stderr']:.5f}",
            "" if p[quality] is None else f"{p[quality]:.4g}",
            f"{100 * p[agreement]:.1f} %",
            style="bold" if p["kind"] == "mixed" else "",
        )
    return rows


def _spelled(agreement: str) -> str:
    return {"top1_agreement": "same top-1"}.get(agreement, agreement)


def _stderr(agreement: str) -> str:
    return f"{agreement.removesuffix('_agreement')}_stderr"


def verdict(comparison: dict[str, Any]) -> str:
    """What mixing bought at one budget, in a sentence."""
    c = comparison
    if c["baseline"] is None:
        return f"{c['budget']}: no uniform scheme fits; the mixed plan is the only one"
    if c["z"] is None:
        return f"{c['budget']}: the mixed plan and {c['baseline']} cannot be told apart (one document)"
    difference = _with_error(c["kl_difference"], c["stderr"])
    if abs(c["z"]) < 2:
        return f"{c['budget']}: mixing bought nothing measurable over {c['baseline']} (KL difference {difference} nats)"
    share = abs(c["kl_difference"]) / c["baseline_kl"] * 100
    word = "saves" if c["z"] < 0 else "costs"
    return (
        f"{c['budget']}: mixing {word} {share:.0f} % of the KL of {c['baseline']} "
        f"({c['plan_kl']:.4f} against {c['baseline_kl']:.4f} nats, difference {difference}, z {c['z']:.1f})"
    )


def _ending(winner: dict[str, Any]) -> str:
    """What a budget ends with, and against what it won."""
    others = [name for name in winner["selection_kl"] if name != winner["plan"]]
    kl = winner["selection_kl"]
    best = f" (of the others {min(others, key=kl.__getitem__)}: {min(map(kl.get, others)):.4g})" if others else ""
    return f"{winner['plan']} wins, with KL {kl[winner['plan']]:.4g} on the selection set{best}"


def _made(winner: dict[str, Any]) -> str:
    """What the ways to make a plan's weights leave, and which of them is handed out."""
    kl = ", ".join(f"{way} {value:.4g}" for way, value in winner["ways_kl"].items())
    text = f"KL of {winner['plan']} on the selection set by how its weights are made"
    return f"    {text}: {kl}; {winner['method']} is taken"


def _prediction(plan: dict[str, Any]) -> str:
    """Predicted against measured loss."""
    summed = _with_error(plan["predicted_kl"], plan["predicted_stderr"])
    measured = _with_error(plan["kl"], plan["kl_stderr"])
    if plan["corrected_kl"] is None:
        return f"predicted {summed}, measured {measured} nats"
    corrected = _with_error(plan["corrected_kl"], plan["corrected_stderr"])
    return f"predicted {corrected} (sum over weights {summed}), measured {measured} nats"


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "no labels"
    if value == 0:
        return "0"
    if error is None or error != error:
        return f"{value:.4g}"
    return f"{value:.4g} ± {error:.1g}"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
