"""`python -m analysis FOLDER...`: draw everything of run folders again."""

import sys

from analysis.report import write_run
from mpq.types import MpqError


def main(folders: list[str]) -> int:
    """Draw each folder; returns the exit code, 2 after a sentence on standard error if one cannot be drawn."""
    if not folders:
        print("usage: python -m analysis FOLDER...: run folders as 'mpq run' makes them", file=sys.stderr)
        return 2
    try:
        for folder in folders:
            write_run(folder)
    except MpqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
