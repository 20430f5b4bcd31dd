"""What `mpq export` does: a quantized model into a file or folder of another runtime."""

from pathlib import Path
from typing import Any

from mpq.config import known
from mpq.data.sources import read_sets
from mpq.export import orbax
from mpq.export.targets import TARGETS
from mpq.gguf.container import require_gguf
from mpq.gguf.export import decoder_of
from mpq.gguf.search import Options, Search, Target, best_file
from mpq.models import load
from mpq.pipeline import score_store
from mpq.sensitivity import METRICS
from mpq.types import MpqError


def export(source: Path, to: str, out: Path, **options: Any) -> dict[str, Any]:
    """Write `source`, what `mpq quantize -o` wrote, in the format `to`; whole or not at all.

    Args:
      source: folder.
      to: name in `TARGETS`.
      out: file or folder.
      options: for the format; those that are None or False are not given.
    """
    target = known("format", to, TARGETS)
    if out.exists():
        raise MpqError(f"{out} exists already: choose another name or remove it")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if unknown := [name for name in given if name not in target.options]:
        raise MpqError(f"format {to} has no option --{unknown[0].replace('_', '-')}: leave it out")
    exported = orbax.load(source)
    if (rounded := exported.plan.get("activations")) and not (target.activations or target.rounds_alike):
        raise MpqError(
            f"{source} rounds {len(rounded)} activations as well, and format {to} holds weights only: quantize with "
            "the plan of the weights alone"
        )
    written = target.save(out, exported, source.name, **given)
    return {"out": str(out), "to": to, "size_bytes": written}


def best(source: str, data: str, out: Path, target: Target, options: Options) -> dict[str, Any]:
    """The best GGUF file within the target; finished scores lie by content in `scores` beside it."""
    require_gguf()
    known("metric", options.metric, METRICS)
    model = load(source)
    decoder_of(model.config)
    sets = read_sets(model, data, window=options.window, limits=options.limits, windows_per_document=4)
    search = Search(model, sets, out.stem, options, score_store(out.parent / "scores"))
    return best_file(search, target, out)
