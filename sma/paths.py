"""Field paths: `layers.layer.modules.attention.window` names one value of a spec, for `--set` and for sweeps.

Values are set in the plain data before validation, so a value can complete a spec that is invalid without it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import BaseModel

from sma.errors import SpecError, did_you_mean, quote
from sma.yaml_text import read_yaml

if TYPE_CHECKING:
    from sma.spec import Spec

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([0-9]+)\]")
_INDEX = re.compile(r"[0-9]{1,9}")

STEPS = 32
"""Maximum number of steps of a path, more than the depth of any spec."""


def parse_path(path: str) -> tuple[str | int, ...]:
    """Split `layers[2].router.kind` into `("layers", 2, "router", "kind")`; `layers.2.router.kind` is the same.

    Raises:
        SpecError: the path is empty, has an empty step or too many of them.
    """
    steps: list[str | int] = []
    end = 0
    while end < len(path) and len(steps) < STEPS:
        match = _STEP.match(path, end)
        if match is None:
            break
        name, index = match.groups()
        step = index if name is None else name
        # A longer number stays a word, because no list has such an index.
        steps.append(int(step) if _INDEX.fullmatch(step) else step)
        end = match.end()
    if not steps or end != len(path):
        raise SpecError(
            f"{quote(path)} is not a field path; write names joined by dots, such as "
            "layers.layer.router.temperature_scale"
        )
    return tuple(steps)


Settings = Mapping[str, Any] | Sequence[str]
"""Values by field path, or a list of `path=value`."""


def parse_setting(setting: str) -> tuple[str, Any]:
    """Split `path=value`, as `--set` takes it; the value is YAML, so `null`, `[1, 2]` and `{kind: never}` work.

    Raises:
        SpecError: there is no `=`, or the value is not YAML.
    """
    path, equals, value = setting.partition("=")
    if not equals:
        raise SpecError(f"the setting {quote(setting)} has no '='; write path=value, such as width=32")
    return path.strip(), read_yaml(value, f"the value of the setting {quote(path.strip())[1:-1]}")


def parse_settings(settings: Settings) -> dict[str, Any]:
    """Values by field path; of equal paths in a list, the last one counts.

    Raises:
        SpecError: they are neither a mapping of field paths nor a list of valid `path=value`.
    """
    paths = list(settings) if isinstance(settings, Mapping | list | tuple) else [settings]
    if not isinstance(settings, Mapping | list | tuple) or not all(isinstance(path, str) for path in paths):
        raise SpecError(
            f"settings are a mapping of field paths to values, such as {{'width': 32}}, or a list, such as "
            f"['width=32'], not {quote(settings)}"
        )
    return dict(settings) if isinstance(settings, Mapping) else dict(map(parse_setting, settings))


def override(root: type[Spec], data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plain `data` with values set by field path.

    Defaults on a path are written out first, so that all their fields can be set.

    Raises:
        SpecError: a path does not exist; the message lists similar names.
    """
    changed = _plain(data)
    for path, value in values.items():
        _set(root, changed, parse_path(path), value, path)
    return changed


def _plain(data: Any) -> Any:
    """A deep copy of spec data, with specs in it converted to plain data."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json")
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data


def _set(annotation: Any, node: Any, steps: tuple[str | int, ...], value: Any, path: str) -> None:
    step, rest = steps[0], steps[1:]
    if isinstance(node, list):
        if not isinstance(step, int) or step >= len(node):
            raise SpecError(f"{quote(path)}: {quote(step)} is not an index of a list of {len(node)}; count from 0")
        key: Any = step
        inner = _item_type(annotation)
    elif isinstance(node, dict):
        key = str(step)
        spec_class = _spec_class(annotation, node)
        if spec_class is not None and key not in spec_class.model_fields:
            raise _nowhere(path, key, [name for name in spec_class.model_fields if name != "kind"])
        inner = spec_class.model_fields[key].annotation if spec_class is not None else _item_type(annotation)
        if rest and node.get(key) is None:
            default = (
                spec_class.model_fields[key].get_default(call_default_factory=True) if spec_class is not None else None
            )
            if isinstance(default, BaseModel | Mapping | tuple):
                node[key] = _plain(default)
            elif any(_spec_types(inner)) and (spec_class is not None or rest == ("kind",)):
                node[key] = {}  # a null or missing part, whose other fields validation requires
            else:
                known = (
                    node
                    if spec_class is None
                    else [name for name, child in node.items() if isinstance(child, dict | list)]
                )
                raise _nowhere(path, key, list(known))
    else:
        raise SpecError(f"{quote(path)} leads into {quote(node)}, which has no fields")
    if not rest:
        node[key] = _plain(value)
        if key == "kind" and isinstance(node, dict):
            _drop_foreign_fields(annotation, node)
        return
    _set(inner, node[key], rest, value, path)


def _drop_foreign_fields(annotation: Any, node: dict[str, Any]) -> None:
    """Delete the fields of the old kind that a new kind does not have, so that it starts from its defaults."""
    fields = [
        set(spec.model_fields) for spec in (root.concrete(node) for root in _spec_types(annotation)) if spec is not None
    ]
    for name in list(node):
        if fields and name not in fields[0]:
            del node[name]


def _nowhere(path: str, key: str, known: list[str]) -> SpecError:
    return SpecError(
        f"unknown field path {quote(path)}: there is no {quote(key)} here{did_you_mean(key, known, 'fields')}"
    )


def _spec_class(annotation: Any, node: dict[str, Any]) -> type[Spec] | None:
    """The spec class of a node with this annotation; None for a mapping of free names."""
    candidates = [spec.concrete(node) for spec in _spec_types(annotation)]
    fitting = [spec for spec in candidates if spec is not None and set(node) <= set(spec.model_fields)]
    return next(iter(fitting or [spec for spec in candidates if spec is not None]), None)


def _spec_types(annotation: Any) -> Iterator[type[Spec]]:
    """Yield the spec classes that the annotation allows for a value itself, not for the items of a collection."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for choice in get_args(annotation):
            yield from _spec_types(choice)
    elif hasattr(annotation, "__metadata__"):
        yield from _spec_types(annotation.__origin__)
    elif isinstance(annotation, type) and hasattr(annotation, "concrete"):
        yield annotation


def _item_type(annotation: Any) -> Any:
    """The annotation of the items of a list or of the values of a mapping, also in a union."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return next((found for found in map(_item_type, get_args(annotation)) if found is not None), None)
    if hasattr(annotation, "__metadata__"):
        return _item_type(annotation.__origin__)
    if origin is dict:
        return get_args(annotation)[1]
    return get_args(annotation)[0] if origin in (tuple, list) else None


def field_paths(data: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every value in plain spec data, as from `dump_spec`."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from field_paths(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        for index, value in enumerate(data):
            yield from field_paths(value, f"{prefix}[{index}]")
    else:
        yield prefix
