"""Text of the reference model: the source of CPython's standard library, as installed on this machine.

Files are documents. A file's split is decided by a hash of its path inside the library, so adding a file moves no
other:
one in twenty is held out, and the held-out files alternate (by the same hash) between selection and test.
"""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
MAX_BYTES = 400_000  # larger files are generated tables


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents `(path, text)` of each split, and a digest over all of them."""

    train: tuple[tuple[str, str], ...]
    selection: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    digest: str


def read(root: Path | None = None) -> Corpus:
    """The standard library's Python files under `root` (default: the running interpreter's), split by path.

    `encodings` (code page tables), `pydoc_data`, `lib2to3` and files that are not UTF-8 are left out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "selection": [], "test": []}
    digest, seen = hashlib.sha256(), set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")) or path.stat().st_size > MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8").strip()
        except UnicodeDecodeError:
            continue
        key = hashlib.sha256(text.encode()).digest()
        if not text or key in seen:
            continue
        seen.add(key)
        digest.update(hashlib.sha256(name.encode()).digest() + key)
        splits[split_of(name)].append((name, text + "\n"))
    return Corpus(*(tuple(splits[s]) for s in ("train", "selection", "test")), digest=digest.hexdigest())


def split_of(name: str) -> str:
    """`train`, `selection` or `test` for a path inside the library."""
    h = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return "train" if h % 20 else ("selection" if (h // 20) % 2 else "test")
