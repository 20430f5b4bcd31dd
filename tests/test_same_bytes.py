"""`mpq run` as a person runs it, in processes of its own: one or two threads, or killed ten times, the same bytes."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny

CONFIG = """
from mpq.config import RunConfig

CONFIG = RunConfig(
    name="tiny", model="model", data="text.txt", schemes=("int2_g16", "int3_g16", "int4_g16"), window=32, batch_size=4,
    budgets=("3.5bpw", "int3_g16"), hand_out="3.5bpw", calibration_windows=16, selection_windows=12, test_windows=12,
    sensitivity_windows=(("kl", 8), ("fisher", 8), ("hessian_trace", 4)), refine_rounds=1, refine_windows=8,
)
"""

KILLED = """
import os, signal, sys
from mpq import cli, files

left, move = int(sys.argv.pop(1)), files._move

def killing(source, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(source, target)

files._move = killing
cli.main(sys.argv[1:])
"""

ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    tiny.write_folder(folder / "model")
    (folder / "text.txt").write_text(tiny.text(documents=200))
    (folder / "config.py").write_text(CONFIG)
    return folder


def run(place, out, *before, program=("-m", "mpq"), **environment):
    command = [*before, sys.executable, *program, "run", "config.py", "-o", out]
    return subprocess.run(command, cwd=place, env=os.environ | environment, capture_output=True, text=True)


def content(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "costs.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] != want[name]] == []


@pytest.fixture(scope="module")
def want(place):
    assert run(place, "usual").returncode == 0
    return content(place / "usual")


@pytest.mark.slow
def test_one_thread_gives_the_same_bytes(place, want):
    pinned = ("taskset", "-c", "0") if shutil.which("taskset") else ()
    assert run(place, "one", *pinned, **ONE_THREAD).returncode == 0
    assert_same(content(place / "one"), want)


@pytest.mark.slow
def test_killed_at_ten_random_points_and_resumed_gives_the_same_bytes(place, want):
    for writes in np.random.default_rng(0).integers(1, len(want) // 10, size=10):
        killed = run(place, "killed", program=("-c", KILLED, str(writes)))
        assert killed.returncode == -signal.SIGKILL
    assert run(place, "killed").returncode == 0
    assert_same(content(place / "killed"), want)


@pytest.mark.slow
def test_programs_that_another_process_compiled_give_the_same_bytes(place, want):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = lambda: {path.name for path in (place / "programs").glob("*-cache")}
    assert run(place, "compiled", **cache).returncode == 0
    compiled = kept()
    assert compiled
    assert run(place, "found", **cache).returncode == 0
    assert kept() == compiled  # nothing was compiled anew
    assert_same(content(place / "found"), want)
