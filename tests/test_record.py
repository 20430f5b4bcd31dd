"""A record says what determined a result, with the same bytes every time; what varies is kept apart."""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpq import files, record
from mpq.record import Costs, RunRecord
from mpq.types import MpqError


def collect() -> RunRecord:
    return RunRecord.collect(
        {"name": "quick", "budgets": ("3.5bpw",)}, seeds={"all": 0}, inputs={"model": "ab"}, command="mpq run x.py"
    )


def raise_file_not_found(*_args):
    raise FileNotFoundError


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one commit that holds `mpq/code.py`."""
    if record._git(tmp_path, "--version") is None:
        pytest.skip("git is not installed")
    (tmp_path / "mpq").mkdir()
    (tmp_path / "mpq" / "code.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class TestRunRecord:
    def test_says_what_it_ran_on(self):
        this = collect()
        assert this.versions["jax"] == jax.__version__
        assert this.versions["numpy"] == np.__version__
        assert set(this.versions) == set(record.PACKAGES)
        assert this.python == platform.python_version()
        assert (this.device_kind, this.device_count) == (jax.devices()[0].device_kind, len(jax.devices()))
        assert this.settings["jax_default_matmul_precision"] == "highest"  # as the tests set it

    def test_has_the_same_bytes_twice(self):
        assert files.canonical_json(collect().to_json()) == files.canonical_json(collect().to_json())

    def test_round_trip(self, tmp_path):
        this = collect()
        files.write_json(tmp_path / "record.json", this.to_json())
        again = RunRecord.from_json(files.read_json(tmp_path / "record.json", "a record"))
        assert dataclasses.replace(again, config={}) == dataclasses.replace(this, config={})
        assert again.config == {"name": "quick", "budgets": ["3.5bpw"]}  # JSON has lists only
        assert again.to_json() == json.loads(files.canonical_json(this.to_json()))

    def test_an_uninstalled_package_is_none(self, monkeypatch):
        monkeypatch.setattr(record, "PACKAGES", ("numpy", "no-such-package-of-ours"))
        assert collect().versions == {"numpy": np.__version__, "no-such-package-of-ours": None}

    def test_another_schema_is_refused(self):
        with pytest.raises(MpqError, match="run record of schema 99 cannot be read: this version reads 1"):
            RunRecord.from_json({**collect().to_json(), "schema": 99})

    def test_other_fields_are_refused_by_name(self):
        body = collect().to_json()
        del body["seeds"]
        with pytest.raises(MpqError, match="not a run record: it lacks seeds, has sedes; its fields are"):
            RunRecord.from_json({**body, "sedes": {}})


class TestGitState:
    def test_clean(self, checkout):
        assert record.git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)

    @pytest.mark.parametrize(
        ("name", "dirty"), [("mpq/code.py", True), ("mpq/new.py", True), ("mpq/sub/new.py", True), ("runs/out", False)]
    )
    def test_dirty_by_changed_files_and_by_new_code(self, checkout, name, dirty):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("x = 2\n")
        assert record.git_state(checkout)[1] is dirty

    def test_a_folder_inside_another_project_is_no_checkout(self, checkout):
        assert record.git_state(checkout / "mpq") == (None, None)

    def test_outside_a_checkout(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert record.git_state(tmp_path) == (None, None)

    def test_before_the_first_commit(self, tmp_path):
        if record._git(tmp_path, "init", "-q") is None:
            pytest.skip("git is not installed")
        assert record.git_state(tmp_path) == (None, None)

    def test_without_git(self, checkout, monkeypatch):
        monkeypatch.setenv("PATH", str(checkout))
        assert record.git_state(checkout) == (None, None)

    def test_inside_a_hook_of_another_repository(self, checkout, monkeypatch):
        head = git(checkout, "rev-parse", "HEAD")
        monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
        assert record.git_state(checkout)[0] == head


class TestCosts:
    def test_peak_memory_is_in_bytes_and_sees_an_allocation(self, root):
        # In a process of its own: the peak of this one may be far above what is resident now. A child of a large
        # process inherits that one's peak in getrusage; this one's is made large to see that it does not matter.
        large = np.ones(100_000_000, np.float64)
        code = (
            "import numpy; from mpq.record import peak_rss_bytes; before = peak_rss_bytes()['self'];"
            "block = numpy.ones(25_000_000); print(peak_rss_bytes()['self'] - before)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
        # 200 MB are touched page by page; a quarter is slack for memory that was resident and free before.
        assert 150e6 < int(done.stdout) < 250e6
        assert record.peak_rss_bytes()["self"] >= large.nbytes

    def test_peak_memory_without_proc(self, monkeypatch):
        monkeypatch.setattr(Path, "read_text", raise_file_not_found)
        assert record.peak_rss_bytes()["self"] > 10e6  # an interpreter with JAX takes more than ten megabytes

    def test_time_adds_up_also_over_a_failure(self):
        seconds: dict[str, float] = {}
        for error in (None, ValueError):
            try:
                with record.timed(seconds, "stage"):
                    time.sleep(0.02)
                    if error:
                        raise error
            except ValueError:
                pass
        assert seconds["stage"] >= 0.04  # sleep never returns early

    def test_time_of_a_block_within_one_of_its_stage_counts_once(self, monkeypatch):
        clock = iter(range(10))
        monkeypatch.setattr(record.time, "perf_counter", lambda: float(next(clock)))
        seconds = {"stage": 100.0}
        with record.timed(seconds, "stage"), record.timed(seconds, "stage"):
            pass  # ticks 0 and 1 begin, 2 and 3 end
        assert seconds == {"stage": 103.0}

    def test_round_trip(self):
        costs = Costs.collect({"trace": 0.5})
        assert Costs.from_json(json.loads(files.canonical_json(costs.to_json()))) == costs
        assert set(costs.peak_rss_bytes) == {"self", "children"}

    def test_other_fields_are_refused_by_name(self):
        with pytest.raises(MpqError, match="not a run's costs: it lacks seconds"):
            Costs.from_json({"schema": 1, "peak_rss_bytes": {}})
