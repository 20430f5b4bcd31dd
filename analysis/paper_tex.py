"""TeX from what the pages of results show: texts and numbers escaped, Markdown tables, macros of numbers."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from analysis.text import MINUS

HEAD = "% Written by `python -m analysis.paper` from experiments/results. Do not edit.\n"
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"\ensuremath{\pm}",
    "→": r"\ensuremath{\to}",
    "×": r"\ensuremath{\times}",
    "²": r"\textsuperscript{2}",
    "\N{EN DASH}": "--",
    MINUS: r"\ensuremath{-}",
}
_POWER = re.compile(r"(?<![\w.])(?P<mantissa>\d+(?:\.\d+)?)e(?P<exponent>-?\d+)\b")
_NAME = re.compile(r"[A-Za-z]+")
_MARKUP = re.compile(r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`|\[(?P<link>[^]]+)\]\([^)]*\)|\*(?P<italic>[^*]+)\*")


def escape(text: str) -> str:
    """Plain text as TeX shows it; `1.2e-6` as a power of ten, a hyphen before a number as a minus sign."""
    text = re.sub(r"(?<![\w.)])-(?=\d)", MINUS, text)
    parts, last = [], 0
    for match in _POWER.finditer(text):
        parts += [
            _plain(text[last : match.start()]),
            rf"\ensuremath{{{match['mantissa']}\cdot10^{{{int(match['exponent'])}}}}}",
        ]
        last = match.end()
    return "".join([*parts, _plain(text[last:])])


def _plain(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def from_markdown(text: str) -> str:
    """Text of one cell of a page: bold, italic, code and links as TeX has them, everything else escaped."""
    parts, last = [], 0
    for match in _MARKUP.finditer(text):
        parts.append(escape(text[last : match.start()]))
        inner = match["link"] or match["bold"] or match["code"] or match["italic"]
        if match["bold"]:
            parts.append(rf"\textbf{{{from_markdown(inner)}}}")
        elif match["code"]:
            parts.append(rf"\texttt{{{_plain(inner)}}}")
        else:
            parts.append(rf"\emph{{{escape(inner)}}}" if match["italic"] else escape(inner))
        last = match.end()
    return "".join([*parts, escape(text[last:])])


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in the markup of pages.

    Attributes:
      head: of the columns.
      right: whether a column is of numbers.
      rows: each as long as `head`.
    """

    head: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]

    def keep(self, wanted: Callable[[tuple[str, ...]], bool]) -> "Table":
        """The rows that are wanted."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if wanted(row)))

    def columns(self, *places: int, heads: Mapping[int, str] | None = None) -> "Table":
        """The columns at these places, in this order, some under another head, by place."""
        heads = heads or {}
        return Table(
            tuple(heads.get(i, self.head[i]) for i in places),
            tuple(self.right[i] for i in places),
            tuple(tuple(row[i] for i in places) for row in self.rows),
        )

    def cells(self, change: Callable[[str], str]) -> "Table":
        """Every cell changed."""
        return dataclasses.replace(self, rows=tuple(tuple(map(change, row)) for row in self.rows))

    def beside(self, head: str, cells: Sequence[str]) -> "Table":
        """One more column of texts, in front of the others."""
        rows = tuple((cell, *row) for cell, row in zip(cells, self.rows, strict=True))
        return Table((head, *self.head), (False, *self.right), rows)

    def above(self, *others: "Table") -> "Table":
        """The rows of others, whose columns are the same, below these."""
        return dataclasses.replace(self, rows=self.rows + tuple(row for other in others for row in other.rows))

    def folded(self) -> "Table":
        """The second half of the rows beside the first."""
        half = (len(self.rows) + 1) // 2
        second = (*self.rows[half:], *[("",) * len(self.head)] * (2 * half - len(self.rows)))
        rows = tuple((*left, *right) for left, right in zip(self.rows[:half], second, strict=True))
        return Table(self.head * 2, self.right * 2, rows)

    def tex(self) -> str:
        """A `tabular` between the rules of booktabs."""
        line = lambda cells: " & ".join(map(from_markdown, cells)) + r" \\"
        body = [
            rf"\begin{{tabular}}{{@{{}}{''.join('r' if right else 'l' for right in self.right)}@{{}}}}",
            r"\toprule",
            line(self.head),
            r"\midrule",
            *map(line, self.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return HEAD + "\n".join(body) + "\n"


def parse(markdown: str) -> Table:
    """The table that a page shows."""
    head, rule, *rows = [_cells(line) for line in markdown.strip().splitlines()]
    return Table(head, tuple(cell.endswith(":") for cell in rule), tuple(rows))


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))


def macros(numbers: Mapping[str, str]) -> str:
    r"""One `\newcommand` a number; names are of letters, as TeX wants them."""
    wrong = [name for name in numbers if not _NAME.fullmatch(name)]
    assert not wrong, f"{wrong}: TeX has letters alone in names"
    return HEAD + "".join(rf"\newcommand{{\{name}}}{{{escape(text)}}}" + "\n" for name, text in numbers.items())
