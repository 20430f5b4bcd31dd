"""Files are whole or absent, JSON has one form, digests see content and nothing else."""

import dataclasses
import enum
import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq import files
from mpq.types import MpqError


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    names: tuple[str, ...]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail_with(number: int):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


class TestCanonicalJson:
    def test_golden(self):
        value = {"b": [1, 2.5, None], "a": {"nested": [[1, 2], [3, 4]]}, "c": True, "empty": {}, "é": "ü"}
        assert files.canonical_json(value) == (
            '{\n "a": {\n  "nested": [\n   [1, 2],\n   [3, 4]\n  ]\n },\n "b": [1, 2.5, null],\n "c": true,\n'
            ' "empty": {},\n "\\u00e9": "\\u00fc"\n}\n'
        )

    def test_takes_what_stages_hold(self):
        value = {
            "f32": np.float32(0.1),
            "f64": np.float64(0.1),
            "i": np.int64(3),
            "b": np.bool_(True),
            "a": np.arange(4).reshape(2, 2),
            "t": (1, 2),
            "d": Point(1.5, ("p",)),
            "e": Color.RED,
            "path": Path("x/y"),
        }
        assert json.loads(files.canonical_json(value)) == {
            "f32": 0.10000000149011612,  # the double that equals the float32
            "f64": 0.1,
            "i": 3,
            "b": True,
            "a": [[0, 1], [2, 3]],
            "t": [1, 2],
            "d": {"x": 1.5, "names": ["p"]},
            "e": "red",
            "path": "x/y",
        }

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda children: st.lists(children) | st.dictionaries(st.text(), children),
            max_leaves=12,
        )
    )
    def test_round_trip_is_exact_and_order_does_not_matter(self, value):
        text = files.canonical_json(value)
        assert json.loads(text) == value
        assert text.isascii()
        assert text.endswith("\n")
        if isinstance(value, dict):
            assert files.canonical_json(dict(reversed(value.items()))) == text

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("-inf")])
    def test_refuses_what_is_not_finite_and_says_where(self, bad):
        with pytest.raises(MpqError, match=r"table\.rows\[1\]\[0\] is (nan|inf|-inf)"):
            files.canonical_json({"table": {"rows": [[1.0], [bad]]}})

    def test_names_the_top_level_value(self):
        with pytest.raises(MpqError, match="the value is nan"):
            files.canonical_json(float("nan"))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"a": {1: 2}}, "key 1 of a is not text"),
            ({"a": [{2}]}, r"a\[0\] is a set"),
            ({"a": b"x"}, "a is a bytes"),
            (Point, "the value is a type"),
        ],
    )
    def test_refuses_what_has_no_json_form(self, bad, message):
        with pytest.raises(TypeError, match=message):
            files.canonical_json(bad)


class TestReadJson:
    def read(self, path, **kwargs):
        return files.read_json(path, "a plan, as 'mpq allocate' writes it", **kwargs)

    def test_reads_what_was_written(self, tmp_path):
        value = {"x": [1.5, None, "é"], "y": {}}
        files.write_json(tmp_path / "deep" / "plan.json", value)
        assert self.read(tmp_path / "deep" / "plan.json") == value

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b" \n", "is empty"),
            (b'{"a": [1, 2', r"ends too early \(truncated\?\)"),
            (b'{"a": "unfin', r"ends too early \(truncated\?\)"),
            (b'{"a": ', r"ends too early \(truncated\?\)"),
            (b"weights: 3", "is not valid JSON"),
            (b'{"a": 1} trailing', "is not valid JSON"),
            (b'{"a": NaN}', "NaN is not a JSON number"),
            (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
            (b"\xff\xfe\x00", "is not JSON text"),
            (b"[" * 100_000, "is not valid JSON"),
            (b"[1, 2]", "holds a JSON list, not a dict"),
        ],
    )
    def test_a_wrong_file_is_named_with_what_it_should_be(self, tmp_path, content, message):
        path = tmp_path / "plan.json"
        path.write_bytes(content)
        with pytest.raises(MpqError, match=message) as caught:
            self.read(path)
        assert str(path) in str(caught.value)
        assert "it should be a plan, as 'mpq allocate' writes it" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_every_cut_of_a_file_is_refused(self, tmp_path):
        whole = files.canonical_json({"name": "p", "choices": {"a": "int4_g64"}, "sizes": [[1, 2], [3]]}).encode()
        path = tmp_path / "plan.json"
        for length in range(len(whole.rstrip())):
            path.write_bytes(whole[:length])
            with pytest.raises(MpqError):
                self.read(path)

    def test_missing(self, tmp_path):
        with pytest.raises(MpqError, match=r"cannot read .*none\.json: it does not exist; it should be a plan"):
            self.read(tmp_path / "none.json")

    def test_folder(self, tmp_path):
        with pytest.raises(MpqError, match="it is a folder, not a file"):
            self.read(tmp_path)

    def test_another_kind_can_be_asked_for(self, tmp_path):
        (tmp_path / "l.json").write_text("[1]")
        assert self.read(tmp_path / "l.json", kind=list) == [1]


class TestWriting:
    def test_text_keeps_its_line_ends(self, tmp_path):
        files.write_text(tmp_path / "t", "a\r\nß\n")
        assert (tmp_path / "t").read_bytes() == b"a\r\n\xc3\x9f\n"

    def test_overwrites_and_leaves_nothing_else(self, tmp_path):
        files.write_bytes(tmp_path / "f", b"old")
        files.write_bytes(tmp_path / "f", b"new")
        assert contents(tmp_path) == {"f": b"new"}

    def test_permissions_follow_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            files.write_bytes(tmp_path / "f", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.ENOSPC, "the disk is full; free some space"),
            (errno.EDQUOT, "the disk is full; free some space"),
            (errno.EACCES, "no permission; choose"),
            (errno.EROFS, "no permission; choose"),
            (errno.EIO, "Input/output error"),
        ],
    )
    @pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
    def test_a_refusal_is_a_sentence_and_the_old_file_stays(self, tmp_path, monkeypatch, number, message, step):
        path = tmp_path / "f"
        files.write_bytes(path, b"old")
        with monkeypatch.context() as patch:
            if step == "write_bytes":

                def half(self, data):
                    with open(self, "wb") as file:
                        file.write(data[: len(data) // 2])
                    fail_with(number)()

                patch.setattr(Path, "write_bytes", half)
            else:
                patch.setattr(os, step, fail_with(number))
            with pytest.raises(MpqError, match=message) as caught:
                files.write_bytes(path, b"much longer new content")
        assert str(path) in str(caught.value)
        assert contents(tmp_path) == {"f": b"old"}

    def test_an_interrupt_leaves_nothing(self, tmp_path):
        def interrupted():
            with files.writing(tmp_path / "f") as sibling:
                sibling.write_bytes(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert contents(tmp_path) == {}

    def test_a_file_in_the_path_is_named_as_the_reason(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(MpqError, match="a part of its path is a file, not a folder"):
            files.write_bytes(tmp_path / "file" / "sub" / "f", b"")
        with pytest.raises(MpqError, match="a part of its path is a file, not a folder"):
            files.write_bytes(tmp_path / "file" / "f", b"")

    def test_a_file_does_not_replace_a_folder(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "kept").write_text("x")
        with pytest.raises(MpqError, match="it is a folder, not a file"):
            files.write_bytes(tmp_path / "folder", b"")
        assert contents(tmp_path) == {"folder/kept": b"x"}

    def test_leftovers_of_a_killed_process_go_and_those_of_a_running_one_stay(self, tmp_path):
        with subprocess.Popen(["sleep", "60"]) as running:
            dead = subprocess.Popen(["true"])
            dead.wait()
            names = [f".f.{dead.pid}.tmp", f".f.{running.pid}.tmp", f".f.{os.getpid()}.tmp", ".f.notes.tmp", ".g.1.tmp"]
            for name in names:
                (tmp_path / name).write_bytes(b"half")
            try:
                files.write_bytes(tmp_path / "f", b"whole")
                assert set(contents(tmp_path)) == {"f", f".f.{running.pid}.tmp", ".f.notes.tmp", ".g.1.tmp"}
            finally:
                running.terminate()


class TestWritingAFolder:
    def fill(self, path: Path, value: bytes) -> None:
        with files.writing(path) as sibling:
            (sibling / "sub").mkdir(parents=True)
            (sibling / "sub" / "a").write_bytes(value)

    def test_appears_and_is_replaced_as_a_whole(self, tmp_path):
        self.fill(tmp_path / "out", b"1")
        (tmp_path / "out" / "stray").write_bytes(b"of the old one")
        self.fill(tmp_path / "out", b"2")
        assert contents(tmp_path) == {"out/sub/a": b"2"}
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_a_failure_leaves_the_old_folder(self, tmp_path):
        self.fill(tmp_path / "out", b"1")

        def fills_the_disk():
            with files.writing(tmp_path / "out") as sibling:
                sibling.mkdir()
                (sibling / "half").write_bytes(b"x")
                raise OSError(errno.ENOSPC, "no space")

        with pytest.raises(MpqError, match="disk is full"):
            fills_the_disk()
        assert contents(tmp_path) == {"out/sub/a": b"1"}

    def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(self, tmp_path, monkeypatch):
        self.fill(tmp_path / "out", b"1")
        replace, calls = os.replace, []

        def second_fails(source, target):
            calls.append(source)
            if len(calls) == 2:
                fail_with(errno.EIO)()
            replace(source, target)

        monkeypatch.setattr(os, "replace", second_fails)
        with pytest.raises(MpqError, match="cannot write"):
            self.fill(tmp_path / "out", b"2")
        assert contents(tmp_path) == {"out/sub/a": b"1"}

    def test_a_file_system_without_folder_flush_is_fine(self, tmp_path, monkeypatch):
        fsync = os.fsync

        def files_only(handle):
            if os.path.isdir(f"/proc/self/fd/{handle}"):
                fail_with(errno.EINVAL)()
            fsync(handle)

        monkeypatch.setattr(os, "fsync", files_only)
        self.fill(tmp_path / "out", b"1")
        assert contents(tmp_path) == {"out/sub/a": b"1"}


class TestDigests:
    def test_file_is_sha256_of_its_bytes(self, tmp_path):
        data = np.random.default_rng(0).bytes(3_000_001)  # more than two chunks and a bit
        (tmp_path / "f").write_bytes(data)
        assert files.digest_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()

    def test_unreadable_file(self, tmp_path):
        with pytest.raises(MpqError, match=r"cannot read .*: it does not exist"):
            files.digest_file(tmp_path / "f")

    def test_json_ignores_order_and_sees_values(self):
        assert files.digest_json({"a": 1, "b": (2,)}) == files.digest_json({"b": [2], "a": 1})
        assert files.digest_json({"a": 1}) != files.digest_json({"a": 1.0})

    def test_arrays_golden(self):
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        expected = hashlib.sha256(b'["w", "float32", [2, 3]]' + array.tobytes()).hexdigest()
        assert files.digest_arrays({"w": array}) == expected

    def test_arrays_see_content_only(self):
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        same = [jnp.asarray(array), np.asfortranarray(array), array.astype(">f4"), np.repeat(array, 2, axis=1)[:, ::2]]
        assert {files.digest_arrays({"a": a, "b": array}) for a in same} == {
            files.digest_arrays({"b": array, "a": array})
        }

    def test_arrays_see_every_difference(self):
        zeros = np.zeros((2, 3), np.float32)
        different = [
            {"a": zeros},
            {"b": zeros},
            {"a": zeros.reshape(3, 2)},
            {"a": zeros.astype(np.int32)},
            {"a": zeros.astype(np.float16)},
            {"a": zeros.astype(ml_dtypes.bfloat16)},  # same width and bits as float16
            {"a": zeros, "b": zeros[:0]},
            {"a": zeros, "b": zeros[:, :0]},
            {"a": np.float32(0)},
            {"a": -zeros},  # minus zero has another bit
            {},
        ]
        assert len({files.digest_arrays(arrays) for arrays in different}) == len(different)

    def test_python_objects_are_refused(self):
        with pytest.raises(TypeError, match="'a' holds Python objects"):
            files.digest_arrays({"a": np.array([object()])})
