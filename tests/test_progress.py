"""Bars for a person, lines for a log, and nothing for a library."""

import io
import itertools

import pytest
from rich.console import Console

from mpq import progress
from mpq.progress import Watch, shown, track


@pytest.fixture
def clock(monkeypatch):
    """Every look at it is ten seconds after the one before."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(seconds)))


def log_of(items, total, clock):
    console = Console(file=io.StringIO(), width=120)
    with shown(console):
        assert list(track(items, "score kl", total)) == list(range(8))
        return [line for line in console.file.getvalue().splitlines() if ", eta" in line or "/?" in line]


def test_a_log_gets_a_line_now_and_then(clock):
    """After 30 and 60 of 80 seconds, not after every item, and not for the last, whose bar comes anyway."""
    assert log_of(range(8), None, clock) == ["score kl 3/8, 0:00:30, eta 0:00:50", "score kl 6/8, 0:01:00, eta 0:00:20"]


def test_a_log_says_so_where_nobody_knows_how_many_there_are(clock):
    assert log_of(iter(range(8)), None, clock) == ["score kl 3/?, 0:00:30", "score kl 6/?, 0:01:00"]


def test_a_log_has_the_loss(clock):
    console = Console(file=io.StringIO(), width=120)
    with shown(console):
        watch = Watch("distill", outputs=1000, every=1)
        for _ in track(range(8), "distill"):
            watch.tell(1.25)
    assert "distill 1.2500 50/s 2/8, 0:00:40, eta 0:02:00" in console.file.getvalue()


def test_a_person_gets_bars_and_no_lines(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown(console):
        assert list(track(range(8), "score kl")) == list(range(8))
    assert "8/8" in console.file.getvalue()
    assert ", eta" not in console.file.getvalue()


def test_the_library_is_quiet(capsys):
    assert list(track(range(3), "score kl")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
