"""Tasks: what a recipe learns, and where its data comes from. A file or a folder each; `kinds` registers all."""

_MOVED = {
    **dict.fromkeys(("ClassificationTask", "Samples", "TaskData", "TaskSpec"), "contract"),
    **{f"{name.capitalize()}Task": name for name in ("digits", "image", "recall", "retrieval", "text")},
    **{f"{name.capitalize()}Task": f"{name}.task" for name in ("language", "pathfinder", "speech")},
    "ListOpsTask": "listops.task",
    "PathXTask": "pathfinder.task",
}


def __getattr__(name: str) -> None:
    """Answer an import of a task from its former place with its present one."""
    if name in _MOVED:
        raise ImportError(f"{name} has moved to {__name__}.{_MOVED[name]}", name=f"{__name__}.{_MOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
