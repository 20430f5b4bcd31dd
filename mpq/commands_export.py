"""What `mpq export` does: a quantized model into a file of another runtime."""

from pathlib import Path
from typing import Any

from mpq.config import known
from mpq.export import orbax
from mpq.gguf import export as gguf

TARGETS = {"gguf": gguf}


def export(source: Path, to: str, out: Path) -> dict[str, Any]:
    """Write `source`, what `mpq quantize -o` wrote, in the format `to`; whole or not at all."""
    known("format", to, TARGETS)
    written = TARGETS[to].save(out, orbax.load(source), source.name)
    return {"out": str(out), "to": to, "size_bytes": written}
