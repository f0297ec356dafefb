"""Rules of the architecture: imports between files, size of files, and documentation of public names."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

import sma
import sma.modules
import sma.routers
import sma.testing

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"sma": "sma", "modules": "sma.modules", "recipes": "sma.recipes", "tune": "sma.tune"}

# Files of the core. A file may import files of its own row and of earlier rows.
CHAIN = [
    ["errors"],
    ["files", "memory"],
    ["yaml_text", "strict", "mistakes"],
    ["spec"],
    ["ragged", "decision", "submodule", "norms", "positions", "kernels"],
    ["wrap"],
    ["routers", "activation"],
    ["layer", "encoders", "heads"],
    ["repeat"],
    ["model"],
]
# Folders and files of the recipes, with the same rule. The last row has the programs.
FLOORS = [
    ["io"],
    ["tasks"],
    ["experiment"],
    ["reports"],
    ["training"],
    ["studies"],
    [
        *("seqboat_lra", "seqboat_speech", "seqboat_lm", "routed_mlp", "routed_conv"),
        *("recall", "reach", "rates", "compare", "router_table"),
    ],
]
# These may import everything, so no other file of the core may import them.
TOP = ("sma.testing", "sma.interop", "sma.commands", "sma.__main__")

THIRD_PARTY = {
    "torch",
    "einops",
    "filelock",
    "pydantic",
    "pydantic_core",
    "yaml",
    "jaxtyping",
    "numpy",
    "torch_scatter",
    "triton",
}
EXPERIMENTS_ONLY = {
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "matplotlib",
    "tensorboard",
    "pydantic_settings",
    "rich",
}


def _files(*folders: str) -> list[Path]:
    """Python files of the folders, each once: symbolic links in sma/ are not followed."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents if ROOT in parent.parents)
    )


def _module(path: Path) -> str:
    """Dotted name under which a file is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES.get(folder, folder), *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All descendants of a node, except those under `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _running(child)


def _imports(path: Path, ours: frozenset[str]) -> set[str]:
    """Absolute dotted names that a file imports, also inside functions; `from sma import ragged` is `sma.ragged`."""
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in _running(_tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found.update(name if (name := f"{base}.{alias.name}") in ours else base for alias in node.names)
    return found


def _offenders(paths: list[Path], faults: Callable[[Path], Any]) -> dict[str, Any]:
    """The files that violate a rule, with their faults. One test per rule checks all files and lists all violations."""
    return {path.relative_to(ROOT).as_posix(): found for path in paths if (found := faults(path))}


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


SOURCES = _files(*PACKAGES)
OURS = frozenset(map(_module, SOURCES))


def _executed(path: Path) -> set[str]:
    """Modules that the import of a file executes: its imports and their packages, except the packages of the file."""
    own = {".".join(_module(path).split(".")[:depth]) for depth in range(1, 9)}
    found = _imports(path, OURS)
    packages = {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 1)}
    return found | (packages & OURS) - own


@cache
def _graph() -> dict[str, set[str]]:
    """`_executed` of every file; built on first use, because every worker collects these tests but few run them."""
    return {_module(path): _executed(path) for path in SOURCES}


CORE = [path for path in _files("sma") if not _within(_module(path), *TOP)]


def _route(start: str, goals: set[str]) -> list[str] | None:
    """The shortest chain of imports from `start` to one of `goals`; None if there is none."""
    routes, seen = [[start]], {start}
    while routes:
        route = routes.pop(0)
        for name in sorted(_graph().get(route[-1], ())):
            if name in goals:
                return [*route, name]
            if name not in seen:
                seen.add(name)
                routes.append([*route, name])
    return None


def _foreign(path: Path) -> list[str]:
    """Imports of a file other than sma, the standard library and the dependencies of the core."""
    allowed = THIRD_PARTY | set(sys.stdlib_module_names) | {"sma"}
    return [name for name in _graph()[_module(path)] if name.split(".")[0] not in allowed]


def test_core_imports_only_itself_and_its_dependencies() -> None:
    assert _offenders(CORE, _foreign) == {}


def test_core_never_imports_packages_built_on_it() -> None:
    built = ("sma.modules", "sma.recipes", "sma.tune", *TOP)
    assert _offenders(CORE, lambda path: [name for name in _graph()[_module(path)] if _within(name, *built)]) == {}


@pytest.mark.parametrize("row", [pytest.param(row, id=",".join(names)) for row, names in enumerate(CHAIN[:-1])])
def test_import_graph_of_the_core_is_a_line(row: int) -> None:
    later = {f"sma.{name}" for names in CHAIN[row + 1 :] for name in names}
    assert [route for name in CHAIN[row] if (route := _route(f"sma.{name}", later))] == []


def test_no_import_cycles() -> None:
    assert _offenders(SOURCES, lambda path: _route(_module(path), {_module(path)})) == {}


@pytest.mark.parametrize("floor", [pytest.param(floor, id=",".join(rooms)) for floor, rooms in enumerate(FLOORS[:-1])])
def test_import_graph_of_the_recipes_is_a_line(floor: int) -> None:
    rooms = [f"sma.recipes.{room}" for room in FLOORS[floor]]
    above = {
        name
        for name in _graph()
        if any(_within(name, f"sma.recipes.{room}") for row in FLOORS[floor + 1 :] for room in row)
    }
    assert [route for name in _graph() if _within(name, *rooms) and (route := _route(name, above))] == []


def test_files_at_the_top_of_recipes_are_programs() -> None:
    rooms = {room for row in FLOORS[:-1] for room in row}
    files = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", *rooms}
    assert files == {"environment", *FLOORS[-1]}


def test_zoo_never_imports_routers_layers_or_models() -> None:
    routing = {"sma.routers", "sma.activation", "sma.layer", "sma.model"}
    assert _offenders(_files("modules"), _foreign) == {}
    assert _offenders(_files("modules"), lambda path: _route(_module(path), routing)) == {}


def _registers(path: Path) -> bool:
    """Whether a file registers a kind: a class under the decorator `@register`."""
    classes = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.ClassDef))
    return any(ast.unparse(decorator) == "register" for node in classes for decorator in node.decorator_list)


def test_no_kind_of_the_zoo_imports_another() -> None:
    kinds = {_module(path) for path in _files("modules") if _registers(path)}
    paths = [path for path in _files("modules") if path.name != "__init__.py"]
    assert _offenders(paths, lambda path: _graph()[_module(path)] & kinds) == {}


def test_only_tune_imports_ray() -> None:
    paths = _files("sma", "modules", "recipes", "benchmarks", "examples")
    assert (
        _offenders(paths, lambda path: [name for name in _imports(path, OURS) if _within(name, "ray", "optuna")]) == {}
    )


def test_core_and_zoo_never_import_libraries_for_training_and_figures() -> None:
    def faults(path: Path) -> list[str]:
        return [name for name in _graph()[_module(path)] if _within(name, *EXPERIMENTS_ONLY)]

    assert _offenders(_files("sma", "modules"), faults) == {}


def test_importing_sma_stays_light() -> None:
    heavy = sorted(EXPERIMENTS_ONLY | {"triton", "ray", "optuna", "pandas", "scipy"})
    program = f"import sys, sma; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_surface_is_tiny() -> None:
    assert len(sma.__all__) <= 32
    assert [name for name in sma.__all__ if not hasattr(sma, name)] == []


def _without_docstring(path: Path) -> list[str]:
    """Public names of a file without a docstring; `the file itself` if the module has none."""
    named = [
        node
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and "overload" not in map(ast.unparse, node.decorator_list)  # the implementation has the docstring
    ]
    own = [] if ast.get_docstring(_tree(path)) else ["the file itself"]
    return own + [node.name for node in named if not ast.get_docstring(node)]


def test_public_names_have_docstrings() -> None:
    assert _offenders(_files("sma", "modules"), _without_docstring) == {}


def test_files_have_at_most_400_lines() -> None:
    paths = _files("sma", "modules", "recipes", "tune", "benchmarks", "tests", "examples", ".ci")
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert _offenders(paths, lambda path: lines[path] if lines[path] > 400 else None) == {}


# The conformance kit is a test suite, so it may use assert.
def test_package_never_uses_assert() -> None:
    def lines(path: Path) -> list[int]:
        return [node.lineno for node in ast.walk(_tree(path)) if isinstance(node, ast.Assert)]

    assert _offenders([path for path in SOURCES if not _within(_module(path), "sma.testing")], lines) == {}


def test_core_and_zoo_never_print() -> None:
    def lines(path: Path) -> list[int]:
        calls = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call))
        return [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]

    assert _offenders([path for path in _files("sma", "modules") if path.name != "__main__.py"], lines) == {}


# Modules that the reference of the site describes.
DESCRIBED = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.rst"))
    for name in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]

HINT = "add the module to a page of docs/reference, by `.. automodule::`"


@pytest.mark.parametrize(
    "package",
    [pytest.param(package, id=package.__name__) for package in (sma, sma.modules, sma.routers, sma.testing)],
)
def test_reference_describes_every_exported_name(package: ModuleType) -> None:
    homes = {name: getattr(package, name).__module__ for name in package.__all__ if not name.startswith("__")}
    assert {name: home for name, home in homes.items() if home not in DESCRIBED} == {}, HINT


def test_reference_describes_every_file_that_registers_a_kind() -> None:
    names = {
        f"{inside}.{path.stem}"
        for folder, inside in (("sma", "sma"), ("sma/routers", "sma.routers"), ("modules", "sma.modules"))
        for path in (ROOT / folder).glob("*.py")
        if "@register" in path.read_text(encoding="utf-8").splitlines()
    }
    assert sorted(names - set(DESCRIBED)) == [], HINT


def undocumented(part: object, name: str) -> list[str]:
    """Public functions, classes, methods and properties without an own or inherited docstring, and fields without a
    description.
    """
    if inspect.isfunction(part):
        return [] if part.__doc__ else [name]
    if not inspect.isclass(part):
        return []
    missing = [] if part.__doc__ else [name]
    for key, member in vars(part).items():
        is_code = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
        is_private = getattr(member, "__name__", key).startswith("_")  # such as `pop = _refuse`
        if is_code and not is_private and not key.startswith("_") and not inspect.getdoc(getattr(part, key)):
            missing.append(f"{name}.{key}")
    if issubclass(part, BaseModel):
        fields = part.model_fields.items()
        missing += [f"{name}.{key}" for key, field in fields if key != "kind" and not field.description]
    return missing


def test_everything_in_the_reference_is_documented() -> None:
    missing = [
        f"{name}.{bare}"
        for name in DESCRIBED
        for key, part in vars(importlib.import_module(name)).items()
        if getattr(part, "__module__", None) == name and not key.startswith("_")
        for bare in undocumented(part, key)
    ]
    assert missing == []


def test_a_name_without_a_docstring_is_found() -> None:
    class Bare(BaseModel):
        width: int

        def run(self) -> None: ...

    assert undocumented(Bare, "Bare") == ["Bare", "Bare.run", "Bare.width"]
