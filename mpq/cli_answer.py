"""What all sub-commands share: arguments that mean the same everywhere, and how a result is printed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mpq.progress import shown

Out = Annotated[Path, tyro.conf.arg(aliases=["-o"], help="file or folder to write")]
Source = tyro.conf.Positional[str]
Json = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="print one JSON object")]


def answer(
    compute: Callable[[], dict[str, Any]], as_json: bool, show: Callable[[dict[str, Any], Console], None]
) -> None:
    """Compute the plain result behind progress bars, and print it: as one JSON object, or by `show`."""
    with shown():
        result = compute()
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result, Console())
