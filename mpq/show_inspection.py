"""What `mpq inspect` prints for a person: the plain result that `--json` prints, with equal blocks in one row."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpq.folding import fold, mask

_NARROWEST = 20
"""Columns that paths get at least, however narrow the terminal."""


def inspection(body: dict[str, Any], console: Console, *, every: bool = False) -> None:
    """Weights, what is not quantized, and what other sizes would take.

    Args:
      body: what `mpq.inspect.inspect` returned.
      console: to print to; paths are broken at dots where it is narrow.
      every: one row for every weight.
    """
    macs = f"macs_per_{body['unit']}"
    same = lambda w: (w["kind"], w["k"], w["n"], w["batch"], w["uses"], w[macs], w["stored"], mask(w["group"]))
    rows = fold(body["weights"], lambda w: w["path"], lambda w: w["path"] if every else same(w))
    if rows:
        _weights(body, rows, console)
    if len(rows) < len(body["weights"]):
        console.print("A row with {0-1} stands for several weights: MACs and size of all of them. --all lists each.\n")
    stored = ", ".join(dict.fromkeys(w["stored"] for w in body["weights"]))
    console.print(
        f"{len(body['weights'])} weights ({stored}): {sum(w['size_bytes'] for w in body['weights']):,} of "
        f"{body['size_bytes']:,} bytes, {_short(sum(w[macs] for w in body['weights']))} MACs per {body['unit']}; "
        f"{body['parameters']:,} parameters"
    )
    reasons: dict[str, list[dict[str, Any]]] = {}
    for skipped in body["skipped"]:
        reasons.setdefault(skipped["reason"], []).append(skipped)
    for reason, left in reasons.items():
        paths = [path for path, _ in fold(left, lambda s: s["path"], lambda _: None)]
        console.print(f"not quantized, {reason}: {len(left)} ({', '.join(paths)})", style="dim", highlight=False)
    if body["costs"]:
        _costs(body, console)


def _weights(body: dict[str, Any], rows: Sequence[tuple[str, list[dict[str, Any]]]], console: Console) -> None:
    """The table of weights. Columns that say the same in every row are left out."""
    sizes, macs = Counter(w["group"] for w in body["weights"]), f"macs_per_{body['unit']}"
    columns: dict[str, list[str]] = {
        "kind": [w["kind"].replace("+", "\n+ ") for _, (w, *_) in rows],
        "k x n": [
            f"{w['k']} x {w['n']}" if w["batch"] == 1 else f"{w['batch']} x {w['k']} x {w['n']}" for _, (w, *_) in rows
        ],
        "uses": [str(w["uses"]) for _, (w, *_) in rows],
        f"MACs/\n{body['unit']}": [_short(sum(w[macs] for w in members)) for _, members in rows],
        "fused": [_fused(w["group"], sizes[w["group"]]) for _, (w, *_) in rows],
        "stored": [w["stored"] for _, (w, *_) in rows],
        "size": [f"{_short(sum(w['size_bytes'] for w in members))}B" for _, members in rows],
    }
    if len(set(columns["stored"])) == 1:  # the summary below says it
        del columns["stored"]
    if set(columns["uses"]) == {"1"}:
        del columns["uses"]
    widths = [max(map(len, "\n".join([name, *cells]).split("\n"))) + 2 for name, cells in columns.items()]
    width = max(_NARROWEST, console.width - sum(widths))
    fits = width + sum(widths) <= console.width
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.title, table.title_justify = f"{body['model']}: weights", "left"
    table.add_column("weight", no_wrap=True)
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("kind", "fused", "stored") else "right", no_wrap=fits, overflow="fold"
        )
    for (path, _), *cells in zip(rows, *columns.values(), strict=True):
        table.add_row(_broken(path, width), *cells)
    console.print(table)
    console.print()


def _costs(body: dict[str, Any], console: Console) -> None:
    """Sizes of the whole model."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.title, table.title_justify = "\nthe whole model, with every weight in one scheme or within a budget", "left"
    table.add_column("scheme or budget")
    for name in ("bits per weight", "bytes", "share of the size now"):
        table.add_column(name, justify="right")
    for row in body["costs"]:
        share = 100 * row["size_bytes"] / body["size_bytes"]
        table.add_row(row["at"], f"{row['bits_per_weight']:.4f}", f"{row['size_bytes']:,}", f"{share:.1f} %")
    console.print(table)


def _fused(group: str, members: int) -> str:
    """Which weights share an input: `q,k,v` of `attn.{q,k,v}_proj.kernel`."""
    if members == 1:
        return ""
    names = group[group.find("{") + 1 : group.find("}")]
    return names if "{" in group and "." not in names and len(names) <= 16 else f"{members} weights"


def _broken(path: str, width: int) -> str:
    """`path` in lines of at most `width`, broken after dots."""
    lines = [""]
    for part in path.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits and a decimal prefix, as in `1.34 k` and `141 G`; a unit may follow."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"
