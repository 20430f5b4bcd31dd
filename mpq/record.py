"""Where a result came from: what is needed to get the same bits again, and what it cost.

Two things, kept in two files, because they behave differently:

- `RunRecord` (`record.json`): config, commit, versions, device, seeds and digests of the inputs. The same config on the
  same installation gives the same bytes.
- `Costs` (`costs.json`): wall time per stage and peak memory per process. They differ between runs; nothing else does.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from mpq.types import MpqError

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "mpq")
SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64")
_GIT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What determined a result.

    Attributes:
      config: the configuration of the run, plain data.
      command: what to type to repeat it; None when called from Python.
      seeds: purpose -> seed.
      inputs: name (`model`, `data/test`) -> sha256 digest.
      commit: git commit of the checkout that the code ran from; None outside a checkout.
      dirty: True if that checkout had changes or new code that the commit lacks; None outside a checkout.
      versions: package -> version, None if it is not installed as a package.
      python: version of the interpreter.
      platform: operating system and machine, `Linux-x86_64`.
      device_kind: what JAX computed on, `cpu` or `NVIDIA H100 80GB HBM3`.
      device_count: number of them.
      settings: JAX settings that change numbers.
    """

    config: Mapping[str, Any]
    command: str | None
    seeds: Mapping[str, int]
    inputs: Mapping[str, str]
    commit: str | None
    dirty: bool | None
    versions: Mapping[str, str | None]
    python: str
    platform: str
    device_kind: str
    device_count: int
    settings: Mapping[str, Any]

    @classmethod
    def collect(
        cls,
        config: Mapping[str, Any],
        *,
        seeds: Mapping[str, int],
        inputs: Mapping[str, str],
        command: str | None = None,
    ) -> Self:
        """The record of a run with `config` in this process; never fails for want of git or of a package.

        Args:
          config: plain data, as it shall stand in the file.
          seeds: purpose -> seed.
          inputs: name -> sha256 digest of each model and data set.
          command: what to type to repeat the run.

        Returns:
          The record.
        """
        commit, dirty = git_state(Path(__file__).resolve().parent.parent)
        devices = jax.devices()
        return cls(
            config=config,
            command=command,
            seeds=seeds,
            inputs=inputs,
            commit=commit,
            dirty=dirty,
            versions={name: _version(name) for name in PACKAGES},
            python=platform.python_version(),
            platform=f"{platform.system()}-{platform.machine()}",
            device_kind=devices[0].device_kind,
            device_count=len(devices),
            settings={name: getattr(jax.config, name) for name in SETTINGS},
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain data; `mpq.files.write_json` gives it the same bytes every time."""
        return {"schema": SCHEMA, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          MpqError: the fields or the schema number are not those of this version.
        """
        return cls(**_fields(cls, data, "run record"))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run cost. These numbers differ from run to run and stay out of `RunRecord`.

    Attributes:
      seconds: stage -> wall time.
      peak_rss_bytes: process (`self`, `children`) -> largest resident memory; of children: the largest one's.
    """

    seconds: Mapping[str, float]
    peak_rss_bytes: Mapping[str, int]

    @classmethod
    def collect(cls, seconds: Mapping[str, float]) -> Self:
        """The costs so far of this process and of the children that it waited for."""
        return cls(seconds=dict(seconds), peak_rss_bytes=peak_rss_bytes())

    def to_json(self) -> dict[str, Any]:
        """The costs as plain data."""
        return {"schema": SCHEMA, "seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          MpqError: the fields or the schema number are not those of this version.
        """
        return cls(**_fields(cls, data, "run's costs"))


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`, also if interrupted; nested blocks count once."""
    start, before = time.perf_counter(), seconds.get(stage, 0.0)
    try:
        yield
    finally:
        seconds[stage] = before + time.perf_counter() - start


def peak_rss_bytes() -> dict[str, int]:
    """Largest resident memory so far of this process (`self`) and of its largest waited-for child (`children`).

    On Linux `getrusage` of a process starts at what its parent had resident when it was started, so its own number is
    taken from `/proc`; a child's can only be had from `getrusage` and may be that of this process at the time.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS and KiB elsewhere
    who = {"self": resource.RUSAGE_SELF, "children": resource.RUSAGE_CHILDREN}
    peaks = {name: resource.getrusage(which).ru_maxrss * unit for name, which in who.items()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peaks["self"] = int(line.split()[1]) * 1024
    return peaks


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout whose top is `root`, and whether its working tree differs from that commit.

    Changed tracked files make it dirty, and so do new files among the code that computes; new files elsewhere (results,
    notes) do not. A package installed inside some other project's checkout is not that project's code, hence the top
    must be `root` itself.

    Returns:
      (commit, dirty); (None, None) without git, outside a checkout, or before the first commit.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=normal")
    if top is None or commit is None or status is None or Path(top.strip()).resolve() != root.resolve():
        return None, None
    code = ("?? mpq/", "?? kernels_pallas/")
    changes = [line for line in status.splitlines() if not line.startswith("??") or line.startswith(code)]
    return commit.strip(), bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails for whatever reason."""
    # Inside a git hook GIT_DIR and others point at the repository of the hook, not at `root`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            check=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=environment,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fields(cls: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The constructor's arguments in `data`, which must hold exactly those and the schema number."""
    if data.get("schema") != SCHEMA:
        raise MpqError(
            f"a {what} of schema {data.get('schema')!r} cannot be read: this version reads {SCHEMA}; run again"
        )
    expected = {field.name for field in dataclasses.fields(cls)}
    given = set(data) - {"schema"}
    if given != expected:
        odd = [f"lacks {name}" for name in sorted(expected - given)] + [
            f"has {name}" for name in sorted(given - expected)
        ]
        raise MpqError(f"this is not a {what}: it {', '.join(odd)}; its fields are {', '.join(sorted(expected))}")
    return {name: data[name] for name in expected}
