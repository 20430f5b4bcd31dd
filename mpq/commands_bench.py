"""What `mpq bench` does: the kernels of this machine, timed."""

from pathlib import Path
from typing import Any

from rich.console import Console

from kernels_pallas import KernelError, bench
from kernels_pallas.tables import as_json, entries, file_name, own_folder
from mpq import files
from mpq.config import known
from mpq.types import MpqError

SUBJECTS = {"kernels": bench.run}
"""Name -> what measures it."""


def measure(what: str, out: Path | None, tune: bool, options: bench.Options) -> dict[str, Any]:
    """Time everything of a kind that runs here.

    Args:
      what: key of `SUBJECTS`.
      out: JSON file that is written after every case; None for none.
      tune: keep what was fastest as this user's table for this kind of device: `auto` goes by it from then on.
      options: what is measured, and how often.

    Returns:
      What is written to `out`, and under `tuned` the path of the table.

    Raises:
      MpqError: `what` is unknown, or the options match nothing.
    """
    run = known("subject", what, SUBJECTS)
    keep = lambda body: None if out is None else files.write_json(out, body)
    try:
        body, table = run(options, keep)
    except KernelError as error:
        raise MpqError(str(error)) from error
    if not tune:
        return body
    path = own_folder() / file_name(table.device)
    files.write_json(path, as_json(table))
    entries.cache_clear()
    return {**body, "tuned": str(path)}


def show_times(body: dict[str, Any], console: Console) -> None:
    """The table, what it was measured on, and what was written."""
    console.print(bench.show(body["rows"]), soft_wrap=True, highlight=False, markup=False)
    here, limits = body["environment"], body["ceilings"]
    console.print(
        f"\n{here.get('processor', here['device'])}, JAX {here['jax']}; reads {limits['bytes_per_s'] / 1e9:.1f} GB/s; "
        "*: what auto takes; x dense: times as fast as a dense dot; us, p10, p90: microseconds",
        soft_wrap=True,
        highlight=False,
    )
    if "tuned" in body:
        console.print(f"tuned: {body['tuned']}", soft_wrap=True, highlight=False)
