"""Files that are either whole or not there, JSON with the same bytes every time, and digests.

Every stage writes through this module. A file appears under its name only when all of it is on the disk: it is written
to a hidden sibling, flushed, and renamed, so a full disk, an interrupt or a kill leaves the old file or none. What the
operating system refuses becomes one `MpqError` sentence.

Canonical JSON, in which all stage files are written: ASCII; keys sorted; floats in Python's shortest exact form
(`repr`); NumPy scalars and arrays as numbers and nested lists (a float32 as the double that equals it); tuples as
lists; dataclasses as objects; paths as text; lists of scalars on one line; a newline at the end. NaN and infinity are
refused by name: a value that does not exist is written as None, which is `null`.
"""

import contextlib
import dataclasses
import enum
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq.types import MpqError

_CHUNK = 1 << 20


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden sibling to write a file or folder to; it becomes `path` when the block ends without an error.

    Missing parent folders are made. After an error nothing of the sibling stays and `path` is what it was before. An
    existing folder is replaced as a whole, in two renames: between them, for an instant, there is none.

    Args:
      path: where the file or folder shall be.

    Yields:
      The path to write to; it does not exist yet.

    Raises:
      MpqError: the disk is full, or the operating system refuses; also for an `OSError` of the block itself.
    """
    path = Path(path)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        yield sibling
        _flush(sibling)
        _move(sibling, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise MpqError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written there is nothing to remove
            _remove(sibling)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
      MpqError: the disk is full, or the operating system refuses.
    """
    with writing(path) as sibling:
        sibling.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` in UTF-8, line ends as they are; whole or not at all.

    Raises:
      MpqError: the disk is full, or the operating system refuses.
    """
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as canonical JSON; whole or not at all.

    Raises:
      MpqError: a number is not finite, the disk is full, or the operating system refuses.
    """
    write_bytes(path, canonical_json(value).encode())


def canonical_json(value: Any) -> str:
    """`value` as canonical JSON; equal values give equal text. The rules are in the module's docstring.

    Raises:
      MpqError: a number is NaN or infinite; its place is named.
      TypeError: a key is not text, or a value has no JSON form.
    """
    return _render(_plain(value, ""), "") + "\n"


def read_json(path: str | os.PathLike[str], what: str, kind: type = dict) -> Any:
    """Read a JSON file.

    Args:
      path: the file.
      what: what it should be, for the message: `a plan, as 'mpq allocate -o' writes it`.
      kind: type of the top-level value; stage files are objects.

    Returns:
      The value, of type `kind`.

    Raises:
      MpqError: it is missing, unreadable, truncated, not JSON, holds a NaN, or is of another kind.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise MpqError(f"cannot read {path}: {_reason(error)}; it should be {what}") from error
    except UnicodeDecodeError as error:
        raise MpqError(f"{path} is not JSON text; it should be {what}") from error
    if not text.strip():
        raise MpqError(f"{path} is empty; it should be {what}: make it again")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # A decoder that ran out of text stands at its end (an unterminated string: at that string's start).
        cut = isinstance(error, json.JSONDecodeError) and (
            error.pos >= len(text.rstrip()) or "Unterminated" in error.msg
        )
        fault = "ends too early (truncated?)" if cut else f"is not valid JSON ({error})"
        raise MpqError(f"{path} {fault}; it should be {what}: make it again") from error
    if not isinstance(value, kind):
        raise MpqError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}; it should be {what}")
    return value


def digest_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits.

    Raises:
      MpqError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise MpqError(f"cannot read {path}: {_reason(error)}") from error
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of `value` as canonical JSON, 64 hexadecimal digits: the digest of a config.

    Raises:
      MpqError: a number is NaN or infinite.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """sha256 over the sorted names, each with dtype, shape and little-endian elements in C order, in hexadecimal.

    Equal for a NumPy and a JAX array of the same content, whatever its strides and byte order.

    Args:
      arrays: name -> array of any shape.

    Raises:
      TypeError: an array holds Python objects, which have no bytes of their own.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects and has no digest")
        big_endian = array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big")
        if big_endian:
            array = array.astype(array.dtype.newbyteorder("<"))
        # The header is JSON, hence unambiguous: no name or shape can be read as the bytes of another array.
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(value: Any, where: str) -> Any:
    """`value` in dicts, lists and Python scalars; `where` is its place, such as `frontier.size[3]`."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, enum.Enum):
        value = value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, float):
        if not math.isfinite(value):
            raise MpqError(f"{where or 'the value'} is {value}, which JSON cannot hold: find where it came from")
        return float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"key {odd[0]!r} of {where or 'the value'} is not text")
        return {key: _plain(value[key], f"{where}.{key}" if where else key) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where or 'the value'} is a {type(value).__name__}, which has no JSON form")


def _render(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_render(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        lines = [inner + _render(item, inner) for item in value]
    else:
        return json.dumps(value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{indent}{closing}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: OSError) -> str:
    """Why the operating system refused, and what to try."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission; choose a folder or file that you may use"
    if error.errno == errno.ENOENT:
        return "it does not exist"
    if error.errno == errno.EISDIR:
        return "it is a folder, not a file"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a part of its path is a file, not a folder"
    return f"{error.strerror or error}"


def _flush(path: Path) -> None:
    """Ask the disk to keep a file, or every file below a folder."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                _flush(Path(folder, name))
            _flush_folder(Path(folder))
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no flush of folders; the file itself is safe by then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _move(source: Path, target: Path) -> None:
    """Rename over what is there. A folder with content cannot be renamed over: it steps aside first."""
    if not (source.is_dir() and target.is_dir()):
        os.replace(source, target)
        return
    aside = source.with_suffix(".old.tmp")
    _remove(aside)
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(aside, target)
        raise
    _remove(aside)


def _remove_stale(path: Path) -> None:
    """Delete what killed processes left behind while they wrote `path`."""
    prefix = f".{path.name}."
    for sibling in path.parent.iterdir():
        owner = sibling.name.removeprefix(prefix).split(".")[0]
        ours = sibling.name.startswith(prefix) and sibling.name.endswith(".tmp") and owner.isdecimal()
        if ours and not _is_running(int(owner)):
            _remove(sibling)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a leftover of an earlier process with our number: we have not begun to write
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
