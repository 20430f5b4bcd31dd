"""The command line as a test types it."""

import re

from mpq import cli


def exit_code(*arguments):
    """Of `mpq` with these arguments; 0 where it returns."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def finished_bars(err):
    """Description of every progress bar on standard error that reached its end -> its items."""
    bars = re.findall(r"^(\S.*?) +━+ (\d+)/(\d+)", err, re.MULTILINE)
    return {what: int(total) for what, done, total in bars if done == total}
