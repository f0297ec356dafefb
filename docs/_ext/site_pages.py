"""Pages of the repository that lie outside of docs/: their text, and links to them."""

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "site/contributing.md",
    "CHANGELOG.md": "site/changelog.md",
    "examples/sma_shift/README.md": "site/example.md",
}
"""Pages by their paths in the repository, and the pages of docs/ that show them, above what stands in those."""
ORIGINS = {page: origin for origin, page in PAGES.items()}

LINK = re.compile(r"(\]\()([^()\s:#]+)((?:#[^()\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply a change to what stands outside of the code blocks of a page."""
    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def point(text: str, page: str) -> str:
    """Point the links of a page to where the linked files lie in the site.

    Args:
        text: the page.
        page: its path in docs/.
    """
    folder = PurePosixPath(ORIGINS.get(page, f"docs/{page}")).parent

    def replace(match: re.Match[str]) -> str:
        path = os.path.normpath(folder / match[2])
        target = PAGES.get(path, os.path.relpath(path, "docs"))
        return match[1] + os.path.relpath(target, PurePosixPath(page).parent) + match[3]

    return outside_code(text, lambda prose: LINK.sub(replace, prose))


def _read(app: "Sphinx", name: str, source: list[str]) -> None:
    page = f"{name}.md"
    if page in ORIGINS:
        origin = ROOT / ORIGINS[page]
        app.env.note_dependency(str(origin))
        source[0] = point(origin.read_text(encoding="utf-8"), page) + "\n" + source[0]
    elif (ROOT / "docs" / page).exists():
        source[0] = point(source[0], page)


def setup(app: "Sphinx") -> dict[str, bool]:
    """Register the reader."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
