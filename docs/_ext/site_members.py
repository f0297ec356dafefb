"""Base classes that are not public, and members that their class describes already, are left out."""

from sphinx.application import Sphinx


def _bases(app: Sphinx, name: str, obj: object, options: object, bases: list[type]) -> None:
    bases[:] = [base for base in bases if not getattr(base, "__name__", "").startswith("_")]


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Skip the fields of a named tuple, which autodoc shows as `Alias for field number 0`, and pydantic's settings."""
    return True if type(obj).__name__ == "_tuplegetter" or name == "model_config" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the filters."""
    app.connect("autodoc-process-bases", _bases)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
