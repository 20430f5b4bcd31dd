"""Terminal tables for a person: the same plain results that `--json` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def inspection(body: dict[str, Any], console: Console) -> None:
    """Weights, then what is not quantized."""
    table = Table(
        "weight", "kind", "k x n", "uses", "MACs/token", "fused with", "bytes", title=f"{body['model']}: weights"
    )
    members: dict[str, int] = {}
    for w in body["weights"]:
        members[w["group"]] = members.get(w["group"], 0) + 1
    for w in body["weights"]:
        shape = f"{w['k']} x {w['n']}" if w["batch"] == 1 else f"{w['batch']} x {w['k']} x {w['n']}"
        group = w["group"] if members[w["group"]] > 1 else ""
        table.add_row(
            w["path"], w["kind"], shape, str(w["uses"]), f"{w['macs_per_token']:,.0f}", group, f"{w['size_bytes']:,}"
        )
    console.print(table)
    total = sum(w["size_bytes"] for w in body["weights"])
    console.print(
        f"{len(body['weights'])} weights, {total / 1e6:.3f} MB of {body['size_bytes'] / 1e6:.3f} MB; "
        f"{body['parameters']:,} parameters"
    )
    reasons: dict[str, list[str]] = {}
    for s in body["skipped"]:
        reasons.setdefault(s["reason"], []).append(s["path"])
    for reason, paths in reasons.items():
        console.print(f"not quantized: {len(paths)} ({reason}), first {paths[0]}", style="dim")


def written(body: dict[str, Any], console: Console) -> None:
    """What was written where."""
    console.print("  ".join(f"{key} {_text(value)}" for key, value in body.items()))


def table(body: dict[str, Any], console: Console) -> None:
    """Predicted loss increase, one row a weight."""
    rows = Table("weight", *body["schemes"], title=f"predicted loss increase, nats per token ({body['metric']})")
    for path, values, errors in zip(body["weights"], body["loss_increase"], body["stderr"], strict=True):
        rows.add_row(path, *(_with_error(v, e) for v, e in zip(values, errors, strict=True)))
    console.print(rows)
    console.print(f"written to {body['out']}")


def plan(body: dict[str, Any], console: Console) -> None:
    """One plan, and the choice of every weight."""
    rows = Table(
        "weight",
        "scheme",
        title=f"{body['name']}: {body['size_bytes']:,} bytes, {body['bits_per_weight']:.4f} bits per weight",
    )
    for path, scheme in body["choices"].items():
        rows.add_row(path, scheme)
    console.print(rows)
    console.print(
        f"predicted loss increase {_with_error(body['predicted_kl'], body['predicted_stderr'])} nats per token, "
        f"lower bound {body['lower_bound']:.4g}, {body['status']}; written to {body['out']}"
    )


def evaluation(body: dict[str, Any], console: Console) -> None:
    """Quality of one model."""
    rows = Table("measure", "value", title="held-out quality")
    rows.add_row("perplexity", f"{body['perplexity']:.4f}")
    rows.add_row("nll, nats per token", _with_error(body["nll"], body["nll_stderr"]))
    if body["kl"] is not None:
        rows.add_row("KL to reference, nats per token", _with_error(body["kl"], body["kl_stderr"]))
        rows.add_row("top-1 agreement", _with_error(body["top1_agreement"], body["top1_stderr"]))
    rows.add_row("documents, tokens", f"{body['num_documents']}, {body['num_tokens']:,}")
    rows.add_row("size", f"{body['size_bytes']:,} bytes, {body['bits_per_weight']:.4f} bits per weight")
    console.print(rows)


def run(body: dict[str, Any], console: Console) -> None:
    """All plans of a run, and what mixing bought."""
    result = body["results"]
    tokens = result["data"]["test"]
    console.print(
        f"{tokens['num_documents']} held-out documents, {tokens['num_tokens']:,} tokens; original: "
        f"{result['model']['reference_size_bytes'] / 1e6:.2f} MB, perplexity {result['reference']['perplexity']:.3f}"
    )
    for method in dict.fromkeys(p["method"] for p in result["plans"]):
        console.print(_plans_table(method, [p for p in result["plans"] if p["method"] == method]))
    console.print("* wins its budget on the selection set and is handed out\n")
    for c in result["comparisons"]:
        console.print(f"{c['method']:>5}  {verdict(c)}")
    console.print(f"run folder: {body['run']}  (report.html, frontier.png, plan.json, quantized/)")


def _plans_table(method: str, plans: list[dict[str, Any]]) -> Table:
    rows = Table("plan", "bpw", "MB", "KL, nats", "±", "ppl", "same top-1", box=box.SIMPLE, pad_edge=False)
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
            f"{p['perplexity']:.3f}",
            f"{100 * p['top1_agreement']:.1f} %",
            style="bold" if p["kind"] == "mixed" else "",
        )
    return rows


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


def _with_error(value: float, error: float | None) -> str:
    if value == 0:
        return "0"
    if error is None or error != error:
        return f"{value:.4g}"
    return f"{value:.4g} ± {error:.1g}"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
