"""The report: its generated files are those of the committed results, and its text refers to what there is."""

import importlib.metadata
import re
from collections import Counter
from pathlib import Path

import pytest

from analysis import paper, paper_tex
from analysis.paper_figures import FIGURES
from analysis.paper_reproduce import BY_HAND, ROWS
from analysis.paper_sources import Sources, only
from mpq.types import MpqError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "paper"
MAIN = (FOLDER / "main.tex").read_text(encoding="utf-8")
BIBLIOGRAPHY = (FOLDER / "refs.bib").read_text(encoding="utf-8")

LATEX = {"fitted", "code", "KL", "E"}
"""Commands that `main.tex` defines for itself."""


def without_comments(text: str) -> str:
    return re.sub(r"(?<!\\)%.*", "", text)


def body(text: str) -> str:
    return without_comments(text).split(r"\begin{document}")[1].split(r"\end{document}")[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert paper.main([str(folder)]) == 0
    return folder


def files_in(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for kind in ("generated", "figures") for path in (folder / kind).iterdir()
    }


def test_numbers_and_tables_are_those_of_the_committed_results(written):
    assert files_in(written) == files_in(FOLDER)
    for name in sorted(files_in(written)):
        if name.endswith(".tex"):
            assert (written / name).read_text() == (FOLDER / name).read_text(), f"{name}: python -m analysis.paper"


def test_no_kernel_is_out_of_the_picture():
    axes = FIGURES["kernels"](Sources(ROOT)).axes
    points = [(ax, point) for ax in axes for line in ax.lines for point in line.get_xydata()]
    assert len(points) > 30
    assert all(ax.get_ylim()[0] <= y <= ax.get_ylim()[1] for ax, (_, y) in points)


def test_figures_are_those_of_the_committed_results(written):
    """Bytes of drawings are those of one version of matplotlib, the pinned one."""
    pinned = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if importlib.metadata.version("matplotlib") != pinned[1]:
        pytest.skip("another matplotlib than the pinned one draws other bytes")
    drawings = [name for name in sorted(files_in(written)) if name.endswith(".pdf")]
    assert len(drawings) >= 4
    assert sum((FOLDER / name).stat().st_size for name in drawings) < 400_000
    for name in drawings:
        assert (written / name).read_bytes() == (FOLDER / name).read_bytes(), f"{name}: python -m analysis.paper"


def test_every_macro_is_defined_and_used():
    defined = re.findall(r"\\newcommand\{\\(\w+)\}", (FOLDER / "generated" / "numbers.tex").read_text())
    assert len(defined) == len(set(defined)) > 50
    own = set(re.findall(r"\\newcommand\{\\(\w+)\}", MAIN))
    assert own == LATEX
    used = set(re.findall(r"\\([A-Z][A-Za-z]+)\b", body(MAIN)))
    assert used - LATEX == set(defined)


def test_every_generated_file_is_used():
    text = without_comments(MAIN)
    tables = set(re.findall(r"\\fitted\{(\w+)\}", text)) | set(re.findall(r"\\input\{generated/(\w+)\}", text))
    figures = set(re.findall(r"\\includegraphics\{figures/(\w+)\}", text))
    assert {f"generated/{name}.tex" for name in tables} | {f"figures/{name}.pdf" for name in figures} == files_in(
        FOLDER
    )


def test_every_work_is_cited_and_every_citation_is_a_work():
    works = re.findall(r"^@\w+\{(\w+),", BIBLIOGRAPHY, re.MULTILINE)
    cited = {key.strip() for keys in re.findall(r"\\cite\w*\{([^}]*)\}", body(MAIN)) for key in keys.split(",")}
    assert Counter(works).most_common(1)[0][1] == 1
    assert cited == set(works)


def test_every_work_says_who_what_and_when():
    for entry in re.split(r"^@", BIBLIOGRAPHY, flags=re.MULTILINE)[1:]:
        fields = set(re.findall(r"^  (\w+) *=", entry, re.MULTILINE))
        assert {"author", "title", "year"} <= fields, entry
        assert fields & {"booktitle", "journal", "publisher", "howpublished"} or "arXiv:" in entry, entry
        assert entry.count("{") == entry.count("}"), entry


def test_every_reference_has_a_label_and_every_float_is_referred_to():
    labels = re.findall(r"\\label\{([^}]*)\}", MAIN)
    referred = set(re.findall(r"\\(?:ref|eqref)\{([^}]*)\}", MAIN))
    assert len(labels) == len(set(labels))
    assert referred <= set(labels)
    assert {label for label in labels if label.startswith(("fig:", "tab:"))} <= referred


def test_environments_and_braces_are_closed():
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", without_comments(MAIN)):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    for path in (FOLDER / "main.tex", *sorted((FOLDER / "generated").glob("*.tex"))):
        text = re.sub(r"\\[{}]", "", without_comments(path.read_text()))
        assert text.count("{") == text.count("}"), path.name


NAMES = r"ref|eqref|label|cite\w*|includegraphics|fitted|bibliography\w*|begin|end"
"""Commands whose argument no reader sees as it stands."""


def prose(text: str) -> str:
    """What a reader sees as words: no commands, no names that they take, no small whole numbers of a formula."""
    text = re.sub(rf"\\(?:{NAMES})(?:\[[^]]*\])?\{{[^}}]*\}}", " ", text)
    text = re.sub(r"\\setlength\{[^}]*\}\{[^}]*\}", " ", text)
    text = re.sub(r"\\[A-Za-z]+\*?", " ", text)
    small = r"(?<![\d.,])[0-2](?![.,]?\d)"
    return re.sub(r"\$[^$]*\$", lambda match: re.sub(small, " ", match[0]), text)


def numbers_in(text: str) -> list[str]:
    """Numbers that begin a word: `W4A8`, `int8`, `ResNet-20` and `top-1` are names."""
    return re.findall(r"(?<![\w.\\-])-?\d[\d.,]*\S*", text)


@pytest.mark.parametrize(
    "wrong", ["lose 0.1 nats", "3 models", r"$\tau=0.93$", r"at $3.5$ bpw", r"12\,\% less", "2--4 bits", "4-bit"]
)
def test_the_search_for_numbers_finds_them(wrong):
    assert numbers_in(prose(wrong))


@pytest.mark.parametrize(
    "right", [r"$\frac{1}{2N}$", "W4A8 and int8", r"\code{int4\_g64}", r"Table~\ref{tab:1}", "top-1", "Q4\\_K\\_M"]
)
def test_names_and_formulas_are_no_numbers(right):
    assert not numbers_in(prose(right))


def test_no_number_stands_in_the_prose():
    formulas = re.sub(r"\\begin\{equation\}.*?\\end\{equation\}", " ", body(MAIN), flags=re.DOTALL)
    assert not numbers_in(prose(formulas)), "write a macro in analysis/paper_numbers.py"


def test_authors_are_those_of_the_citation_file():
    authors = re.findall(r"- name: (.*)", (ROOT / "CITATION.cff").read_text())
    assert re.findall(r"\\author\{(.*)\}", MAIN) == [" and ".join(authors)]


def test_what_reproduces_a_result_is_there():
    folders = {path.name for path in (ROOT / "experiments" / "results").iterdir() if path.is_dir()}
    assert {folder for folder, *_ in ROWS} == folders
    for folder, commands, page in ROWS:
        for command in commands.split(", "):
            path = command if command.endswith(".py") else command.replace(".", "/") + ".py"
            assert (ROOT / path).exists() or (ROOT / "experiments" / path).exists(), command
        if page != BY_HAND:
            assert (ROOT / "analysis" / f"{page}.py").exists(), folder


class TestTex:
    def test_text_is_escaped(self):
        assert paper_tex.escape("50 % of int4_g64 & #1") == r"50 \% of int4\_g64 \& \#1"
        assert paper_tex.escape("−0.5 ± 0.1") == r"\ensuremath{-}0.5 \ensuremath{\pm} 0.1"
        assert paper_tex.escape("-11.5") == r"\ensuremath{-}11.5"
        assert paper_tex.escape("2–4 and all-MiniLM-L6-v2") == "2--4 and all-MiniLM-L6-v2"

    def test_powers_of_ten(self):
        assert paper_tex.escape("4e-6") == r"\ensuremath{4\cdot10^{-6}}"
        assert paper_tex.escape("int4_1e5x") == r"int4\_1e5x"

    def test_markup_of_pages(self):
        assert paper_tex.from_markdown("**no** `w_1` [run](a/b) *x*") == r"\textbf{no} \texttt{w\_1} run \emph{x}"

    def test_a_table_of_a_page(self):
        table = paper_tex.parse("| a | b | c |\n|---|---:|---:|\n| x | 1 | 2 |\n| y | 3 | 4 |\n")
        assert table.keep(lambda row: row[0] == "y").columns(0, 2, heads={2: "sum"}).tex().splitlines()[1:] == [
            r"\begin{tabular}{@{}lr@{}}",
            r"\toprule",
            r"a & sum \\",
            r"\midrule",
            r"y & 4 \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]
        assert table.above(table).beside("n", "pqrs").rows[2] == ("r", "x", "1", "2")
        assert table.keep(lambda row: row[0] == "y").above(table).columns(0, 1).folded().rows == (
            ("y", "3", "y", "3"),
            ("x", "1", "", ""),
        )

    def test_names_of_macros_are_letters(self):
        assert paper_tex.macros({"One": "1 %"}).splitlines()[1] == r"\newcommand{\One}{1 \%}"
        with pytest.raises(AssertionError, match="letters"):
            paper_tex.macros({"One1": "1"})


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(MpqError, match="nothing"):
        Sources(tmp_path).file("nothing")


def test_one_row_is_one():
    with pytest.raises(AssertionError, match="2 rows"):
        only([{"a": 1}, {"a": 1}], a=1)
    assert only([{"a": 1, "b": 2}, {"a": 1}], b=2) == {"a": 1, "b": 2}
