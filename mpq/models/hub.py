"""Where a model lies: a folder, the model that ships with the package, or the Hugging Face hub."""

import importlib.resources
from pathlib import Path

from mpq.types import MpqError

CONFIGS, WEIGHTS = ("*.json",), ("*.safetensors",)
ELSEWHERE = ("*/*.safetensors", "consolidated*")
"""Weights that many repositories hold a second time, for other programs."""


def resolve(source: str, *, weights: bool = True) -> Path:
    """The folder that `source` names: `reference`, a folder, or a hub id `owner/name[@revision]`, downloaded.

    A revision is a branch, a tag or a commit hash. With `HF_HUB_OFFLINE=1` only what was downloaded before is used.

    Args:
      source: as above.
      weights: False fetches the small JSON files from the hub and leaves the weights there.

    Raises:
      MpqError: neither a folder nor a hub id that could be fetched.
    """
    if source == "reference":
        return Path(str(importlib.resources.files("mpq"))) / "assets" / "reference_lm"
    if Path(source).is_dir():
        return Path(source)
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or source.startswith((".", "/")):
        raise MpqError(
            f"model {source!r} is no folder here: give a checkpoint folder, a hub id 'owner/name', or 'reference'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = [*CONFIGS, *(WEIGHTS if weights else ())]
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=[*ELSEWHERE])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MpqError(
            f"model {source!r} is no folder here and could not be fetched from the hub ({reason})"
        ) from error


def model_name(source: str, folder: Path) -> str:
    """A name for a person. Of a model from the hub, `owner/name@commit`: typed again, it gives the same weights."""
    if source == "reference":
        return source
    if Path(source).exists():
        return folder.resolve().name
    return f"{source.partition('@')[0]}@{folder.name}"  # the hub's cache names a snapshot's folder by its commit
