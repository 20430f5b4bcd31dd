"""`python -m analysis.paper [FOLDER]`: every number, table and figure of the report, from the committed results.

Writes `generated/numbers.tex` (a macro a number of the prose), `generated/*.tex` (tables) and `figures/*.pdf` into
`FOLDER`, or into `paper`; `paper/main.tex` has the words and nothing but words. The same results give the same bytes.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis.figure import pdf
from analysis.paper_figures import FIGURES, SMALL
from analysis.paper_numbers import numbers
from analysis.paper_sources import Sources
from analysis.paper_tables import TABLES
from analysis.paper_tex import macros
from mpq.files import write_bytes

FOLDER = Path("paper")


def texts(sources: Sources) -> Iterator[tuple[str, bytes]]:
    """Numbers and tables: name under the paper's folder, and content."""
    yield "generated/numbers.tex", macros(numbers(sources)).encode()
    for name, table in TABLES.items():
        yield f"generated/{name}.tex", table(sources).tex().encode()


def figures(sources: Sources) -> Iterator[tuple[str, bytes]]:
    """Figures: name under the paper's folder, and content."""
    for name, build in FIGURES.items():
        yield f"figures/{name}.pdf", pdf(lambda build=build: build(sources), SMALL)


def main(arguments: Sequence[str] = ()) -> int:
    """Write all of them; returns the exit code."""
    folder = Path(arguments[0]) if arguments else FOLDER
    sources = Sources(Path.cwd())
    for name, content in (*texts(sources), *figures(sources)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
