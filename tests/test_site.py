"""The site: every public name is in the reference and documented, and the pages of other folders link rightly."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

import sma
import sma.modules
import sma.routers
import sma.testing

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = ROOT / "docs" / "_ext"
DESCRIBED = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.rst"))
    for name in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]

HINT = "add the module to a page of docs/reference, by `.. automodule::`"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """Public functions, classes, methods and properties without a docstring, own or inherited, and bare fields."""
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


@pytest.mark.parametrize("name", DESCRIBED)
def test_everything_in_the_reference_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    own = {key: part for key, part in vars(module).items() if getattr(part, "__module__", None) == name}
    public = {key: part for key, part in own.items() if not key.startswith("_")}
    assert [missing for key, part in public.items() for missing in undocumented(part, key)] == []


def test_figures_are_those_that_the_script_draws() -> None:
    for name, draw in load(ROOT / "docs" / "draw.py").FIGURES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == draw()


def test_a_name_without_a_docstring_is_found() -> None:
    class Bare(BaseModel):
        width: int

        def run(self) -> None: ...

    assert undocumented(Bare, "Bare") == ["Bare", "Bare.run", "Bare.width"]


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        pytest.param("index.md", "docs/data.md#language", "data.md#language", id="README-to-a-page"),
        pytest.param("index.md", "CONTRIBUTING.md", "site/contributing.md", id="README-to-another-page-outside"),
        pytest.param("data.md", "../README.md#figures", "index.md#figures", id="page-to-README"),
        pytest.param("data.md", "routing.md", "routing.md", id="page-to-page"),
        pytest.param("site/contributing.md", "docs/data.md", "../data.md", id="page-outside-to-page"),
        pytest.param("site/guides.md", "contributing.md", "contributing.md", id="within-a-folder"),
        pytest.param("site/example.md", "../../docs/data.md", "../data.md", id="deep-page-outside"),
        pytest.param("data.md", "../examples/a.py", "../examples/a.py", id="file-outside"),
        pytest.param("data.md", "https://arxiv.org/a", "https://arxiv.org/a", id="elsewhere"),
    ],
)
def test_links_lead_to_where_the_site_has_the_file(page: str, link: str, expected: str) -> None:
    point = load(EXTENSIONS / "site_pages.py").point
    code = f"```\n[a]({link})\n```\n"
    assert point(f"[a]({link})\n{code}", page) == f"[a]({expected})\n{code}"


@pytest.mark.parametrize(
    ("markdown", "rst"),
    [
        pytest.param("of `x` tokens", r"of ``x``\  tokens", id="code"),
        pytest.param("`(T, *D)`", r"``(T, *D)``\ ", id="code-with-marks"),
        pytest.param("sum over\n`a\n  b`", "sum over\n``a b``\\ ", id="code-over-two-lines"),
        pytest.param(r"is $x_t \odot y$.", r"is :math:`x_t \odot y`\ .", id="formula"),
        pytest.param("*Packed*: 2 * 3, extract_add_", r"*Packed*: 2 \* 3, extract\_add\_", id="plain-marks"),
        pytest.param("``x``", "``x``", id="already-code"),
    ],
)
def test_markdown_of_docstrings_becomes_rst(markdown: str, rst: str) -> None:
    assert load(EXTENSIONS / "site_docstrings.py").markdown_to_rst(markdown) == rst


def test_hanging_indents_of_shapes_are_removed() -> None:
    lines = [
        "A part.",
        "",
        "Args:",
        "    a: one",
        "        two",
        "",
        "Shape:",
        "    x in,",
        "        y out.",
        "",
        "End.",
    ]
    flush = [*lines[:8], "    y out.", *lines[9:]]
    assert load(EXTENSIONS / "site_docstrings.py").without_hanging_indents(lines) == flush


@pytest.mark.parametrize(
    ("tag", "loads"),
    [
        pytest.param('<script src="https://a.org/b.js">', True, id="script"),
        pytest.param('<link rel="stylesheet" href="//a.org/b.css">', True, id="style"),
        pytest.param('<img alt="a" src="http://a.org/b.png">', True, id="image"),
        pytest.param('<img src="_images/b.png">', False, id="own-image"),
        pytest.param('<a href="https://a.org">', False, id="link-to-follow"),
        pytest.param('<link rel="stylesheet" href="_static/site.css">', False, id="own-style"),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(tag: str, loads: bool) -> None:
    assert bool(load(ROOT / ".ci" / "build_site.py").LOADED.search(tag)) is loads
