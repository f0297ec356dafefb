"""Extensions of the site: links, docstrings and figures. tests/test_architecture.py tests the reference."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = ROOT / "docs" / "_ext"
COMMENT = re.compile(r"^ *%.*$", re.MULTILINE)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_figures_equal_the_output_of_the_script() -> None:
    for name, draw in load(ROOT / "docs" / "draw.py").FIGURES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == draw()


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        pytest.param("index.md", "docs/data.md#language", "data.md#language", id="README-to-a-page"),
        pytest.param("index.md", "CONTRIBUTING.md", "site/contributing.md", id="README-to-another-page-outside"),
        pytest.param("data.md", "../README.md#figures", "index.md#figures", id="page-to-README"),
        pytest.param("data.md", "routing.md", "routing.md", id="page-to-page"),
        pytest.param("site/contributing.md", "docs/data.md", "../data.md", id="page-outside-to-page"),
        pytest.param("site/guides.md", "contributing.md", "contributing.md", id="within-a-folder"),
        pytest.param("site/example.md", "../../docs/data.md", "../data.md", id="nested-page-outside"),
        pytest.param("data.md", "../examples/a.py", "../examples/a.py", id="file-outside"),
        pytest.param("data.md", "https://arxiv.org/a", "https://arxiv.org/a", id="elsewhere"),
    ],
)
def test_links_are_rewritten_to_the_location_in_the_site(page: str, link: str, expected: str) -> None:
    point = load(EXTENSIONS / "site_pages.py").point
    code = f"```\n[a]({link})\n```\n"
    assert point(f"[a]({link})\n{code}", page) == f"[a]({expected})\n{code}"


def test_no_line_of_a_page_is_lost_as_a_comment() -> None:
    origins = load(EXTENSIONS / "site_pages.py").PAGES
    outside_code = load(EXTENSIONS / "site_pages.py").outside_code
    lost = []
    for path in [*(ROOT / origin for origin in origins), *(ROOT / "docs").rglob("*.md")]:
        # MyST treats a line that starts with % as a comment, for example if "10 % of all" breaks after 10.
        outside_code(path.read_text(encoding="utf-8"), lambda prose: lost.extend(COMMENT.findall(prose)) or prose)
    assert lost == []


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
def test_resources_loaded_from_other_hosts_are_found(tag: str, loads: bool) -> None:
    assert bool(load(ROOT / ".ci" / "build_site.py").LOADED.search(tag)) is loads
