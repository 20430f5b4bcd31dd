"""The command line as a test types it."""

from mpq import cli


def exit_code(*arguments):
    """Of `mpq` with these arguments; 0 where it returns."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return 0
