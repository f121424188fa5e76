"""The house itself: what an import costs, which folder knows which, and nothing of its author's machine."""

from __future__ import annotations

import ast
import functools
import gc
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder -> the folders that it may import (core and itself are open to all).
MAY_IMPORT = {
    "core": set(),
    "recipes": set(),
    "model_cards": set(),
    "data": set(),
    "linearise": set(),
    "convert": {"data", "linearise"},
    "explain": {"data", "convert", "linearise"},
    "evaluate": {"data", "convert", "explain"},
    "align": {"data", "linearise", "convert", "explain", "evaluate.metrics.fidelity", "evaluate.report"},
    "publish": {"data", "convert", "explain", "evaluate", "align.recipe"},
    "demo": {"data", "convert", "explain", "evaluate", "align"},
    "students": set(),
    "cli": {"data", "convert", "explain", "align", "evaluate", "publish", "demo", "recipes"},
}
HEAVY = ("transformers", "open_clip", "captum")


@pytest.mark.parametrize("folder", ["convert", "explain", "align", "evaluate", "evaluate.suite", "cli.main"])
def test_an_import_brings_no_other_model_library(folder):
    code = f"import sys, bcosify.{folder}; print(*(name for name in {HEAVY} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


@functools.cache
def parsed(file: Path) -> ast.Module:
    """CPython 3.11's parser fails where other tests' finalisers run in it: nothing is collected meanwhile."""
    gc.disable()
    try:
        return ast.parse(file.read_text())
    finally:
        gc.enable()


def imported(file: Path, lazily: bool = True, root: Path = ROOT) -> set[str]:
    """Dotted names below `bcosify` that a file imports, at its top or anywhere; or only what its import needs."""
    package = list(file.relative_to(root).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(parsed(file)) if lazily else needed(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            names |= {".".join([*filter(None, base), alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bcosify."):
            names |= {f"{node.module.removeprefix('bcosify.')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("bcosify.") for a in node.names if a.name.startswith("bcosify.")}
    return names


def needed(node: ast.AST) -> Iterator[ast.AST]:
    """All below `node` that runs when the file is imported: neither functions nor what is there for types."""
    for child in ast.iter_child_nodes(node):
        typing = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        if not typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from needed(child)


def dotted(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_the_design_allows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    allowed = {"core", folder, *MAY_IMPORT[folder]}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in sorted(imported(file))
        if not any(f"{name}.".startswith(f"{known}.") for known in allowed)
    ]
    assert files and not wrong


def arrows(root: Path) -> dict[str, set[str]]:
    """Folder -> the other folders that its files import, at their top or anywhere."""
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    return {
        folder: {
            name.split(".")[0]
            for file in (root / folder).rglob("*.py")
            for name in imported(file, root=root)
            if name.split(".")[0] in folders - {folder}
        }
        for folder in folders
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One way through the arrows that ends where it began; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_folders_import_each_other_in_a_circle():
    graph = arrows(ROOT)
    assert set(MAY_IMPORT) <= set(graph) and sum(map(len, graph.values())) > 20
    assert not circle(graph)


def test_a_circle_over_three_folders_is_found(tmp_path):
    """Of imports of every kind; none of the arrows alone is wrong."""
    texts = {
        "a": "from ..b import x",
        "b": "def f():\n    from bcosify.c.deep import y",
        "c": "import bcosify.a.module",
        "d": "from ..a import z",
    }
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / "module.py").write_text(text)
    graph = arrows(tmp_path)
    assert graph == {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert set(circle(graph)) == {"a", "b", "c"}
    (tmp_path / "c" / "module.py").write_text("from .deep import y")
    parsed.cache_clear()
    assert not circle(arrows(tmp_path))


def module_of(name: str) -> Path | None:
    """The file that a dotted name below `bcosify` lies in: a module, or what a module holds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None


@pytest.mark.parametrize("folder", ["convert/libraries", "convert/kernels"])
def test_no_files_of_a_folder_import_each_other_in_a_circle(folder):
    files = {file: file.relative_to(ROOT).as_posix() for file in sorted((ROOT / folder).rglob("*.py"))}
    found = {name: {module_of(one) for one in imported(file)} for file, name in files.items()}
    graph = {name: {files[file] for file in needs if file in files} - {name} for name, needs in found.items()}
    assert sum(map(len, graph.values())) > 20 and not circle(graph)


def test_kernels_know_no_layers():
    files = sorted((ROOT / "convert" / "kernels").glob("*.py"))
    names = {name for file in files for name in imported(file) if name.startswith("convert.")}
    assert names and all(name.startswith("convert.kernels.") for name in names)


def test_no_import_goes_in_a_circle():
    """Python would import some circles; a reader cannot begin anywhere in one."""
    folders = {place.partition(".")[0] for place in MAY_IMPORT}
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    needs = {dotted(file): map(module_of, imported(file, lazily=False)) for file in files}
    graph = {name: {dotted(found) for found in several if found} - {name} for name, several in needs.items()}
    assert sum(map(len, graph.values())) > 300 and not circle(graph)


def test_the_import_walk_sees_what_is_there():
    libraries = ROOT / "convert" / "libraries"
    assert module_of("convert.libraries.timm.models.load") == libraries / "timm" / "models.py"
    assert module_of("convert.libraries.timm") == libraries / "timm" / "__init__.py"
    assert "linearise.mode.gated_by" in imported(ROOT / "convert" / "kernels" / "bcos.py")
    assert "convert.layers.BiasScheduled" in imported(ROOT / "convert" / "taps.py")
    assert "core.errors.PlanError" in imported(ROOT / "convert" / "plan.py")


def kept_files() -> list[Path]:
    """The files that git keeps or would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# The folder that the checkout lies in, and where the running Python is installed: what slips in by copy and paste.
HERE = [
    f"{place}/" for place in {str(ROOT.parent), sys.prefix, str(Path.home())} if place.count("/") > 0 and len(place) > 1
]
INDEX = re.compile(r"https?://\S+/simple\b|(?:--|_|\b)(?:extra[-_])?index[-_]url\b|--find-links", re.IGNORECASE)


def test_no_file_names_a_place_on_this_machine_or_a_package_index():
    found = []
    for path in kept_files():
        if path == Path(__file__).resolve():
            continue
        text = path.read_bytes().decode(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if any(re.search(rf"(?<![\w.-]){re.escape(place)}", line) for place in HERE) or INDEX.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


@pytest.mark.parametrize(
    "line",
    ["pip install -i https://mirror.example/simple x", "PIP_INDEX_URL=x", "--extra-index-url x", "index-url = x"],
)
def test_addresses_of_package_indexes_are_recognised(line):
    assert INDEX.search(line)
