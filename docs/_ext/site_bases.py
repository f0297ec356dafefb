"""Base classes that are not public are left out."""

from sphinx.application import Sphinx


def _public(app: Sphinx, name: str, obj: object, options: object, bases: list[type]) -> None:
    bases[:] = [base for base in bases if not getattr(base, "__name__", "").startswith("_")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the filter."""
    app.connect("autodoc-process-bases", _public)
    return {"parallel_read_safe": True}
