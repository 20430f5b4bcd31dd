"""Rules that hold for the whole repository: documentation, import direction, pinned versions, sizes."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mpq", "kernels_pallas", "experiments", "analysis")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MEGABYTE = 10**6
ROOF = {"mpq/cli.py", "mpq/commands.py", "mpq/commands_activations.py"}

# Import names of distributions that are called otherwise.
DISTRIBUTION = {"orbax": "orbax-checkpoint", "huggingface_hub": "huggingface-hub", "ml_dtypes": "ml-dtypes"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, module_level_only: bool = False) -> Iterator[str]:
    """Dotted names of all imported modules, those in functions included unless only the module level is asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, module_level_only=module_level_only)


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of those classes; protocol members are exempt."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            is_protocol = any("Protocol" in ast.unparse(base) for base in node.bases)
            for member in node.body:
                if isinstance(member, kinds) and not member.name.startswith("_") and not is_protocol:
                    yield f"{node.name}.{member.name}", member


@pytest.mark.parametrize("path", SOURCES, ids=relative)
class TestEverySourceFile:
    def test_is_documented(self, path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bare = [] if ast.get_docstring(tree) else ["the module"]
        bare += [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
        assert not bare, f"{relative(path)}: no docstring on {', '.join(bare)}"

    def test_is_short(self, path):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < 400, f"{relative(path)} has {lines} lines: the house style is about 300, split it"

    def test_imports_run_one_way(self, path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = path.relative_to(ROOT).parts[0]
        # The roof asks for pictures and reports where it needs them; nothing below it, and nothing at import time, may.
        names = set(imports(tree, module_level_only=relative(path) in ROOF))
        above = {
            "kernels_pallas": {"mpq", "experiments", "analysis", "flax"},
            "mpq": {"experiments", "analysis", "tests"},
            "experiments": {"analysis", "tests"},
            "analysis": {"jax", "jaxlib", "flax", "mpq.models", "kernels_pallas", "experiments", "tests"},
        }[package]
        wrong = sorted(n for n in names if any(n == a or n.startswith(a + ".") for a in above))
        assert not wrong, f"{relative(path)} imports {wrong}"

    def test_needs_only_the_core_dependencies_to_be_imported(self, path):
        core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
        core |= {"jaxlib", "ml-dtypes"}  # parts of JAX
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in imports(tree, module_level_only=True):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                distribution = canonicalize_name(DISTRIBUTION.get(top, top))
                assert distribution in core, f"{relative(path)} imports {top}: an extra is imported where it is used"


@pytest.mark.parametrize("path", sorted((ROOT / "mpq" / "allocate").rglob("*.py")), ids=relative)
def test_the_allocator_knows_no_model(path):
    allowed = {"numpy", "scipy", "threadpoolctl", "mpq.allocate", "mpq.types", "mpq.progress", "mpq.units"}
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        known = name.split(".")[0] in sys.stdlib_module_names or any(f"{name}.".startswith(f"{a}.") for a in allowed)
        assert known, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("package", ["mpq.grids", "mpq.types", "mpq.formats"])
def test_the_ground_floor_imports_nothing_above_it(package):
    """`grids` imports nothing of the package, `types` only `grids`, `formats` both."""
    below = ("mpq.grids.", "mpq.types.")[: ("mpq.grids", "mpq.types", "mpq.formats").index(package)]
    base = ROOT / package.replace(".", "/")
    for path in [base.with_suffix(".py")] if base.with_suffix(".py").exists() else base.glob("*.py"):
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert not name.startswith("mpq.") or f"{name}.".startswith((f"{package}.", *below)), relative(path)


def pins() -> dict[str, list[tuple[str, Marker | None]]]:
    """Name -> (version, marker) of every line of `constraints.txt`."""
    result: dict[str, list[tuple[str, Marker | None]]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(
                r'([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)(?:; (python_version [<>=]+ "[0-9.]+"))?', line
            )
            assert match, f"constraints.txt: {line!r} is not NAME==VERSION with an optional Python version"
            name, version, marker = match.groups()
            result.setdefault(canonicalize_name(name), []).append((version, Marker(marker) if marker else None))
    return result


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_pin_is_unambiguous_on_every_python(python):
    for name, versions in pins().items():
        valid = [v for v, marker in versions if marker is None or marker.evaluate({"python_version": python})]
        assert len(valid) == 1, f"{name} has {len(valid)} versions on Python {python}"


def test_pins_keep_the_supported_pairs_of_python_and_jax():
    for name in ("jax", "jaxlib"):
        on = {p: v for v, marker in pins()[name] for p in ("3.11", "3.12") if marker.evaluate({"python_version": p})}
        assert on["3.11"].startswith("0.10.")
        assert on["3.12"].startswith("0.11.")


def test_everything_that_is_installed_for_the_project_is_pinned():
    """Walks the requirements of the project, the developer's tools and the parity checks, as far as installed."""
    todo, seen, pinned = [("mpq", ("dev", "parity"))], set(), pins()
    while todo:
        name, extras = todo.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            assert name != "mpq", "the project is not installed: pip install -e ."
            continue
        for requirement in map(Requirement, lines):
            wanted = (
                any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)) if requirement.marker else True
            )
            key = canonicalize_name(requirement.name)
            if wanted and (key, tuple(requirement.extras)) not in seen:
                seen.add((key, tuple(requirement.extras)))
                todo.append((key, tuple(requirement.extras)))
    cuda = re.compile(r"nvidia-|cuda-|triton$")  # PyTorch itself pins these to the digit
    loose = {name for name, _ in seen if name not in pinned and name != "mpq" and not cuda.match(name)}
    assert len(seen) > 40
    assert not loose, f"constraints.txt lacks {sorted(loose)}"


def test_the_version_is_said_once_and_the_same():
    import mpq

    assert mpq.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def tracked() -> list[Path]:
    """Files that git has, or would have after `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_repository_stays_small():
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 64 * MEGABYTE
    large = [relative(path) for path, size in sizes.items() if size > MEGABYTE and path.suffix != ".safetensors"]
    assert not large, f"{large}: data files stay below a megabyte"
    assets = sum(size for path, size in sizes.items() if relative(path).startswith("mpq/assets/"))
    assert assets <= 16 * MEGABYTE


def test_no_path_of_a_machine_is_written_down():
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")
    texts = {".py", ".md", ".toml", ".txt", ".json", ".cff", ".yml", ".sh", ""}
    places = [path for path in tracked() if path.suffix in texts and path != Path(__file__)]
    assert len(places) > 30
    wrong = [relative(path) for path in places if home.search(path.read_text(encoding="utf-8"))]
    assert not wrong
