"""The state of an interrupted training, an Orbax checkpoint: what was learned, the optimizer's moments, losses so far.

    FOLDER/STEP/state       arrays by number, in the order of the tree, written and read by Orbax shard by shard, onto
                            whatever devices go on with them
    FOLDER/STEP/mpq.json    which training it is of, the losses of its steps, the sha256 of every file

A step has its name when all of it is on the disk, and then the one before is removed: whenever a process is killed, the
last whole state is there.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mpq.export.orbax import disk_errors, quiet
from mpq.files import canonical_json, digest_file, read_json, writing
from mpq.types import MpqError

_STATE, _MANIFEST = "state", "mpq.json"


def exists(path: Path) -> bool:
    """Whether there is a whole state to go on from.

    Raises:
      MpqError: there is something else.
    """
    return bool(_steps(path))


def save(path: Path, whole: Any, losses: list[float], told: Mapping[str, str]) -> None:
    """Write it in the place of the one before; `told["of"]` says which training it is of.

    Raises:
      MpqError: the disk is full or refuses, or `path` is something else.
    """
    from orbax.checkpoint import StandardCheckpointer  # two seconds to import

    before, step = _steps(path), str(len(losses))
    with writing(path / step) as sibling:
        sibling.mkdir()
        with quiet(), disk_errors(), StandardCheckpointer() as checkpointer:
            checkpointer.save(sibling.absolute() / _STATE, _filled(jax.tree.leaves(whole)))
        body = {**told, "losses": losses, "files": _digests(sibling / _STATE)}
        (sibling / _MANIFEST).write_text(canonical_json(body))
    for old in before:
        if old != step:  # a name that no state has, so that half of one is never taken for one
            gone = path / f".{old}.{os.getpid()}.tmp"
            (path / old).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load(path: Path, like: Any, told: Mapping[str, str]) -> tuple[Any, list[float]]:
    """The state in `path`, in the form and on the devices of `like`, and the losses of the steps that it has behind it.

    Raises:
      MpqError: it is damaged, or of another training.
    """
    from orbax.checkpoint import StandardCheckpointer

    step = path / max(_steps(path), key=int)
    again = "remove it to start anew"
    try:
        body = read_json(step / _MANIFEST, "the manifest of a state")
        of, losses, files = body["of"], body["losses"], body["files"]
    except (MpqError, KeyError) as error:
        raise MpqError(f"{path} is truncated or damaged, its {_MANIFEST} cannot be read: {again}") from error
    if of != told["of"]:
        raise MpqError(f"{path} belongs to a training of another model, plan, text or options: {again}")
    # Before Orbax reads: of reads that it had begun when one failed, it lets the results come to a loop that is closed.
    if files != _digests(step / _STATE) or step.name != str(len(losses)):
        raise MpqError(f"{path} is truncated or damaged, not what was written: {again}")
    leaves, form = jax.tree.flatten(like)
    target = {i: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for i, a in _filled(leaves).items()}
    with quiet(), StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(step.absolute() / _STATE, target)
    return form.unflatten([arrays.get(str(i), leaf) for i, leaf in enumerate(leaves)]), losses


def remove(path: Path) -> None:
    """Remove the states, if there are any.

    Raises:
      MpqError: there is something else.
    """
    _steps(path)
    shutil.rmtree(path, ignore_errors=True)


def _steps(path: Path) -> list[str]:
    """Names of the whole states; one that a killed process was writing has another name until it is whole."""
    if not path.exists():
        return []
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    steps = [name for name in names if name.isdecimal() and (path / name / _MANIFEST).is_file()]
    if any(name not in steps and not (name.startswith(".") and name.endswith(".tmp")) for name in names):
        raise MpqError(f"{path} is no state of a training, as an interrupted one leaves it: move or remove it")
    return steps


def _filled(leaves: list[Any]) -> dict[str, Any]:
    """Arrays by number; Orbax refuses those without elements."""
    return {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _digests(folder: Path) -> dict[str, str]:
    """Files by their path in a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): digest_file(file) for file in files}
