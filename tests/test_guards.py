"""Layers and conventions, checked in the syntax trees of the three packages."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "training", "service")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 45
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
TORCH_LIBRARIES = {"torch", "torchvision", "safetensors", "onnxscript"}
WITH_TORCH = {
    "model/checkpoints/dino.py",
    "model/checkpoints/state_dicts.py",
    "model/checkpoints/detectron2.py",
    "model/export/precision.py",
    "model/export/export.py",
    "model/export/onnx_graph.py",
    "model/checkpoints/runs.py",
    "model/backends/torch_session.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def list_imports(nodes: Iterator[ast.AST]) -> list[str]:
    """Full names of the imported modules; a relative import starts with its dots."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return found


def walk_eager(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that importing the module runs: all but the insides of functions."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk_eager(child)


def list_roots(path: Path) -> set[str]:
    """The top packages that a file imports anywhere."""
    return {name.split(".")[0] for name in list_imports(ast.walk(parse(path)))}


def find_modules(names: list[str]) -> list[Path]:
    """The files of our own modules among imported names."""
    candidates = [REPOSITORY.joinpath(*name.split(".")) for name in names if name.split(".")[0] in PACKAGES]
    return [file for base in candidates for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]


def reach(path: Path) -> set[Path]:
    """Our files that importing one of them runs, itself among them."""
    seen, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += find_modules(list_imports(walk_eager(parse(current))))
    return seen


@each_source
def test_model_imports_neither_training_nor_service_and_these_not_each_other(path: Path) -> None:
    forbidden = {"model": {"training", "service"}, "training": {"service"}, "service": {"training"}}
    assert list_roots(path) & forbidden[path.relative_to(REPOSITORY).parts[0]] == set()


def stack(*names: str) -> dict[str, set[str]]:
    """Return layers of which each may import all before it."""
    return {name: set(names[:place]) for place, name in enumerate(names)}


LAYERS = {
    "model": {
        **stack("postprocessing", "formats", "networks", "checkpoints", "backends", "export"),
        "registry": {"postprocessing"},
    },
    "training": {
        **stack("data", "trainer", "pseudo_labels", "evaluation"),
        "mask_transformer": {"data", "trainer", "pseudo_labels"},
        "panoptic_cascade": {"data", "trainer", "pseudo_labels"},
        "self_training": {"data", "trainer", "pseudo_labels", "mask_transformer"},
    },
    "training/evaluation": stack(
        "datasets",
        "overlap",
        "predictors",
        "image_results",
        "cluster_matching",
        "class_mapping",
        "dataset_metrics",
        "evaluation_report",
        "html_report",
        "promotion_gate",
    ),
    "service": stack(
        "settings",
        "auth",
        "metrics",
        "tracing",
        "requests",
        "inference",
        "schemas",
        "rollout",
        "problems",
        "middleware",
        "routes",
        "oip",
        "app",
        "server",
        "cli",
        "__main__",
    ),
}
"""What the folders and files of a folder may import; those that are not named may import all of them."""
HAS_SHARED_MODULES = {"model", "training"}
"""Packages in which every folder may also import the modules that are not named."""


@each_source
def test_imports_between_the_folders_of_a_package_go_one_way(path: Path) -> None:
    imports = list_imports(ast.walk(parse(path)))
    for folder, layers in LAYERS.items():
        if path.is_relative_to(REPOSITORY / folder):
            own = path.relative_to(REPOSITORY / folder).with_suffix("").parts[0]
            prefix = folder.replace("/", ".") + "."
            used = {name.removeprefix(prefix).split(".")[0] for name in imports if name.startswith(prefix)}
            watched = used & set(layers) if folder in HAS_SHARED_MODULES else used
            assert own not in layers or watched - {own} <= layers[own]


def needs_torch(path: Path) -> bool:
    return name_of(path).startswith("model/networks/") or name_of(path) in WITH_TORCH


WITHOUT_TORCH = [path for path in SOURCES if name_of(path).startswith("model/") and not needs_torch(path)]


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=name_of)
def test_modules_without_torch_do_not_import_it(path: Path) -> None:
    # The command line alone may import what needs torch, from inside the functions that need it.
    nodes = walk_eager(parse(path)) if path.parent.name == "commands" else ast.walk(parse(path))
    assert {name.split(".")[0] for name in list_imports(nodes)} & TORCH_LIBRARIES == set()


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=name_of)
def test_modules_without_torch_import_none_that_needs_it(path: Path) -> None:
    assert [name_of(file) for file in reach(path) if needs_torch(file) and file.stat().st_size] == []


@each_source
def test_imports_are_absolute_in_full_and_name_what_they_take(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module not in PACKAGES, f"line {node.lineno}: import from the module, not the package"
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & set(PACKAGES), f"line {node.lineno}"


def test_package_files_are_empty_and_the_tests_are_no_package() -> None:
    assert [name_of(path) for path in SOURCES if path.name == "__init__.py" and path.stat().st_size] == []
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    parts = {part for path in SOURCES for part in path.relative_to(REPOSITORY).with_suffix("").parts}
    assert parts & VAGUE_NAMES == set()


@each_source
def test_a_file_is_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and decorators."""
    documented = ast.get_docstring(function, clean=False)
    docstring = documented.count("\n") + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


@each_source
def test_a_function_is_at_most_45_lines(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    too_long = {each.name: count_lines(each) for each in functions if count_lines(each) > MAX_FUNCTION_LINES}
    assert too_long == {}
