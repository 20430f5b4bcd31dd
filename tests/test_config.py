"""Configs: overrides, and a sentence for everything that is wrong."""

import pytest

from mpq.config import RunConfig, load_config
from mpq.types import MpqError


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from mpq.config import RunConfig\nCONFIG = RunConfig(name='a')\n")
    return str(file)


def test_a_config_file_gives_its_config(path):
    assert load_config(path) == RunConfig(name="a")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("model=./m", "model", "./m"),
        ("budgets=3.0bpw, 4MB", "budgets", ("3.0bpw", "4MB")),
        ("seed=7", "seed", 7),
        ("propagate=false", "propagate", False),
        ("propagate=True", "propagate", True),
        ("windows_per_document=none", "windows_per_document", None),
        ("windows_per_document=3", "windows_per_document", 3),
        ("sensitivity_windows=kl:4,fisher:32", "sensitivity_windows", (("kl", 4), ("fisher", 32))),
    ],
)
def test_overrides(path, text, field, value):
    assert getattr(load_config(path, [text]), field) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "write key=value with a key of name, model"),
        ("colour=red", "write key=value with a key of name, model"),
        ("seed=x", "'x' does not fit seed"),
        ("propagate=1", r"'1' does not fit propagate \(it must be true or false\)"),
        ("sensitivity_windows=kl", "does not fit sensitivity_windows"),
    ],
)
def test_a_wrong_override_is_refused(path, text, message):
    with pytest.raises(MpqError, match=message):
        load_config(path, [text])


@pytest.mark.parametrize(
    ("content", "message"),
    [("X = 1", "defines no CONFIG"), ("CONFIG = 1", "defines no CONFIG"), ("1 / 0", "fails: ZeroDivisionError")],
)
def test_a_wrong_config_file_is_refused(tmp_path, content, message):
    file = tmp_path / "config.py"
    file.write_text(content)
    with pytest.raises(MpqError, match=message):
        load_config(str(file))


def test_a_missing_config_file_is_refused():
    with pytest.raises(MpqError, match="does not exist"):
        load_config("no.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schemes": ("int9_g64",)}, "unknown scheme 'int9_g64'"),
        ({"schemes": ()}, "schemes is empty"),
        ({"refine_rounds": -1}, "refine_rounds is -1: it must be at least 0"),
        ({"gradient_steps": -1}, "gradient_steps is -1: it must be at least 0"),
        ({"refine_windows": 0}, "refine_windows is 0: it must be at least 1"),
        ({"metrics": ("kl", "magic")}, "unknown metric 'magic': the valid ones are kl, fisher, hessian_trace"),
        (
            {"method": "magic"},
            "unknown method 'magic': the valid ones are rtn, hqq, gptq, gptq_act_order, signround, adaround, best$",
        ),
        ({"compare_methods": ("magic",)}, "unknown method 'magic'"),
        ({"metrics": ("fisher",)}, "allocate_by 'kl' is not among the metrics"),
        ({"hand_out": "9bpw"}, "hand_out '9bpw' is not among the budgets"),
        ({"test_windows": 0}, "test_windows is 0"),
    ],
)
def test_check_names_what_is_wrong(change, message):
    with pytest.raises(MpqError, match=message):
        RunConfig(**{"name": "a", **change}).check()


def test_the_quickstart_is_valid():
    load_config("experiments/configs/quickstart.py").check()
