"""Tasks: spec and data of each in one file or one folder; `kinds` registers all of them."""

_MOVED = {
    **dict.fromkeys(("ClassificationTask", "Samples", "TaskData", "TaskSpec"), "contract"),
    **{f"{name.capitalize()}Task": name for name in ("digits", "image", "recall", "retrieval", "text")},
    **{f"{name.capitalize()}Task": f"{name}.task" for name in ("language", "pathfinder", "speech")},
    "ListOpsTask": "listops.task",
    "PathXTask": "pathfinder.task",
}


def __getattr__(name: str) -> None:
    """Raise an error with the present module of a task that was moved."""
    if name in _MOVED:
        raise ImportError(f"{name} has moved to {__name__}.{_MOVED[name]}", name=f"{__name__}.{_MOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
