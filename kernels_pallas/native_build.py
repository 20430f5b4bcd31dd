"""`csrc` as a library of this machine: compiled when it is first wanted, kept in the user's cache, loaded once.

The compiler is `$CXX`, or `c++`, `g++` or `clang++` of the PATH; XLA's headers come with jaxlib. The C is compiled
once for every instruction set of the processor's family and the library chooses among them as it is loaded, so one file
serves every machine of the family that shares a home folder. Where there is no compiler, or it fails, there is a reason
instead, and whoever asks does without. `MPQ_NATIVE=0` asks for that.
"""

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.ffi
import jaxlib

TARGET = "mpq_matmul"
"""Name by which XLA finds the function."""

SOURCES = Path(__file__).parent / "csrc"

# Of kernel.c and panels.c, by family of processors: name -> flags.
_X86 = {
    "avx512": ("-DMPQ_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
    "avx2": ("-DMPQ_AVX2", "-mavx2", "-mfma"),
    "base": ("-O2",),  # others are taken where time matters, and it would take longest to compile
}
_ARM = {"dotprod": ("-DMPQ_DOTPROD", "-march=armv8.2-a+dotprod"), "base": ()}
_FAMILIES = {
    ("Linux", "x86_64"): ("-DMPQ_X86", _X86),
    ("Darwin", "x86_64"): ("-DMPQ_X86", _X86),
    ("Linux", "aarch64"): ("-DMPQ_ARM", _ARM),
}
_OTHERS = ("-DMPQ_OTHER", {"base": ()})

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Library:
    """What was loaded.

    Attributes:
      path: of the file.
      kernels: instruction sets that this machine has, the one that is used first.
    """

    path: Path
    kernels: tuple[str, ...]

    @property
    def fast(self) -> bool:
        """Whether they are faster than XLA: not on a processor without AVX2, where vectors have 16 bytes."""
        return self.kernels != ("base",) or platform.machine() in ("aarch64", "arm64")


@functools.cache
def library() -> Library | str:
    """The library, its function registered with XLA; or why there is none, in a few words."""
    if os.environ.get("MPQ_NATIVE") == "0":
        return "MPQ_NATIVE=0 asks to do without"
    command = compiler()
    if command is None:
        return "there is no C++ compiler: install one or set CXX"
    try:
        path = build(command, cache_folder())
        loaded = ctypes.cdll.LoadLibrary(str(path))
    except subprocess.CalledProcessError as error:
        return f"{command[0]} failed: {_last_line(error.stderr)}"
    except OSError as error:
        return f"it cannot be compiled or loaded: {error.strerror or error}"
    loaded.mpq_kernels.restype = ctypes.c_char_p
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.mpq_matmul), platform="cpu")
    return Library(path, tuple(loaded.mpq_kernels().decode().split()))


def compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler, or None."""
    if given := os.environ.get("CXX", "").split():
        return tuple(given)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    return None


def cache_folder() -> Path:
    """Where libraries are kept: `mpq/native` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq" / "native"


def build(command: tuple[str, ...], folder: Path) -> Path:
    """The library in `folder`, compiled unless one of the same sources, compiler, flags and jaxlib is there.

    Raises:
      subprocess.CalledProcessError: the compiler failed; its standard error is text.
      OSError: there is no such compiler, or the folder cannot be written.
    """
    steps, link = _steps(command)
    version = subprocess.run((*command, "--version"), capture_output=True, check=True, text=True).stdout
    parts = [version, jaxlib.__version__, platform.platform(), repr(steps), repr(link)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = folder / f"{digest[:32]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("compiling the kernels for this machine's CPU into %s", path)
    # Made beside its place and moved there: whoever compiles at the same time never loads half a library.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(steps, scratch)
        _run([link], scratch)
        os.replace(Path(scratch, "native.so"), path)
    return path


def _steps(command: tuple[str, ...]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Commands that make object files, and the one that links them, in a scratch folder."""
    family, kernels = _FAMILIES.get((platform.system(), platform.machine()), _OTHERS)
    common = ("-O3", "-fPIC", "-c")
    steps = [
        (*command, *common, "-x", "c", *flags, str(SOURCES / f"{source}.c"), "-o", f"{source}_{name}.o")
        for source in ("kernel", "panels")
        for name, flags in kernels.items()
    ]
    # System headers, of whose warnings nobody wants to read.
    headers = ("-isystem", jax.ffi.include_dir())
    source = str(SOURCES / "ffi.cc")
    steps.append((*command, *common, "-std=c++17", family, *headers, source, "-o", "ffi.o"))
    objects = [step[-1] for step in steps]
    return steps, (*command, "-shared", *objects, "-o", "native.so")


def _run(steps: list[tuple[str, ...]], folder: str) -> None:
    """All commands at once; the first that failed is raised when all have ended."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(step, cwd=folder, **pipes) for step in steps]
    errors = [process.communicate()[1] for process in running]
    for step, process, error in zip(steps, running, errors, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, step, stderr=error)


def _last_line(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")
