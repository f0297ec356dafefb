"""The directive `public-names`: what a package exports, with the first sentence of each name and a link to the rest."""

import importlib
import inspect

from docutils import nodes
from docutils.statemachine import StringList
from site_docstrings import markdown_to_rst
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class PublicNames(SphinxDirective):
    """List `__all__` of a package. A name that no page describes is a warning, by its link."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = importlib.import_module(self.arguments[0])
        lines = [".. list-table::", "   :widths: 30 70", ""]
        for name in package.__all__:
            part = getattr(package, name)
            if name.startswith("__"):
                continue
            summary = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
            lines.append(f"   * - :py:obj:`{name} <{part.__module__}.{part.__qualname__}>`")
            lines.append(f"     - {markdown_to_rst(summary)}")
        return self.parse_text_to_nodes(StringList(lines, source=self.get_source_info()[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}
