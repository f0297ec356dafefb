"""Specs, the typed, validated and serialisable descriptions of parts, and the registry of their kinds."""

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Never, Self, TypeVar, cast, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sma.errors import SpecError, did_you_mean, quote
from sma.files import read_file
from sma.memory import within_memory
from sma.mistakes import SENTENCES, custom, explained, spec_error
from sma.parts import Repeated, is_repeated, remembering
from sma.paths import Settings, override, parse_settings
from sma.strict import strict
from sma.yaml_text import LIMIT, read_fields, write_yaml

__all__ = [
    "FrozenDict",
    "Spec",
    "dump_spec",
    "find_kind",
    "json_schema",
    "kinds",
    "load_spec",
    "read_spec_file",
    "register",
]

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    from sma.encoders import EncoderSpec
    from sma.heads import HeadSpec
    from sma.model import ModelSpec
    from sma.norms import NormSpec
    from sma.routers import RouterSpec
    from sma.submodule import SubModuleSpec
else:
    ModelMetaclass = type(BaseModel)

PLUGINS = "sma.plugins"

_registry: dict[str, dict[str, type["Spec"]]] = {}


class FrozenDict(dict[str, Any]):
    """An immutable dictionary, so that specs are deeply frozen."""

    def _refuse(self, *args: object, **kwargs: object) -> Never:
        raise TypeError("specs are frozen: make a changed copy with spec.replace(field=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))  # independent of the order, as equality is

    def __reduce__(self) -> tuple[type["FrozenDict"], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


Value = TypeVar("Value")
FrozenMapping = Annotated[dict[str, Value], AfterValidator(FrozenDict)]


class _SpecMeta(ModelMetaclass):
    """Turns the validation error of a direct construction, `GAUSpec(window=0)`, into one `SpecError`."""

    if not TYPE_CHECKING:  # editors would take this signature for that of every spec

        def __call__(cls, *args: Any, **fields: Any) -> Any:
            try:
                return super().__call__(*args, **fields)
            except (ValidationError, RecursionError) as error:
                raise spec_error(error) from None


class Spec(BaseModel, metaclass=_SpecMeta):
    """Base of all specs: frozen, without unknown keys, infinities or NaN, and with strict numbers and booleans.

    A class with a `family` is the root of a family of kinds (sub-modules, routers, norms …). A field annotated with the
    root accepts every registered kind of the family: an instance, or a mapping whose `kind` selects the class.

    Raises:
        SpecError: a field is wrong; the message has one sentence with the path for each.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants"
    )

    family: ClassVar[str]
    default_kind: ClassVar[str | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if "build" in cls.__dict__:
            cls.build = within_memory(cls.build)  # type: ignore[attr-defined]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "family" not in cls.__dict__:
            # Outermost, to include the cross-field checks of a class.
            return core_schema.no_info_wrap_validator_function(cls._explain, strict(handler(source)))
        return core_schema.no_info_plain_validator_function(
            cls._resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(_serialise, info_arg=True),
            metadata={"pydantic_js_functions": [lambda _schema, _handler: {"x-family": cls.family}]},
        )

    @classmethod
    def concrete(cls, data: Mapping[str, Any]) -> "type[Spec] | None":
        """The class that a mapping describes: this one, or that of its kind; None for an unknown kind."""
        if "family" not in cls.__dict__:
            return cls
        kind = data.get("kind", cls.default_kind)
        return kinds(cls.family).get(kind) if isinstance(kind, str) else None

    @classmethod
    def _resolve(cls, data: Any) -> "Spec":
        """Validate a nested spec by the class of its `kind`."""
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise custom(
                f"a {cls.family} must be a mapping with a 'kind'", f", not {quote(data)}; write for example {{kind: …}}"
            )
        kind = data.get("kind", cls.default_kind)
        if kind is None:
            raise custom(f"a {cls.family} needs a 'kind'", f"; known kinds: {', '.join(kinds(cls.family))}")
        found = cls.concrete(data)
        if found is None:
            raise custom(
                f"unknown {cls.family} kind {quote(kind)}", did_you_mean(str(kind), kinds(cls.family), "known kinds")
            )
        return cast(Spec, found.__pydantic_validator__.validate_python({**data, "kind": kind}))

    @classmethod
    def _explain(cls, data: Any, handler: Any) -> Any:
        """Convert errors in the fields of this class to our messages; those of nested specs are not changed."""
        if isinstance(data, Mapping):
            fields = [name for name in cls.model_fields if name != "kind"]
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                names = ", ".join(map(quote, unknown[:SENTENCES])) + (", …" if len(unknown) > SENTENCES else "")
                word = "field" if len(unknown) == 1 else "fields"
                raise custom(cls.__name__, f": unknown {word} {names}{did_you_mean(str(unknown[0]), fields, 'fields')}")
        try:
            return handler(data)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__, [explained(cls, item) for item in error.errors()]
            ) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate a mapping or an instance like pydantic, but with a `SpecError`."""
        try:
            return super().model_validate(obj, **options)
        except (ValidationError, RecursionError) as error:
            raise spec_error(error) from None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """The fields that differ from their defaults, so that a model is one line; the class names the kind."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name != "kind" and (field.is_required() or value != field.get_default(call_default_factory=True)):
                yield name, Repeated(value) if is_repeated(value) else value

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _serialise(value: Spec, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode, exclude_none=info.exclude_none, exclude_defaults=info.exclude_defaults)


Registered = TypeVar("Registered", bound=Spec)


def register(spec_class: type[Registered]) -> type[Registered]:
    """Class decorator: register a kind for YAML, the command line, the JSON schema, the conformance kit and sweeps.

    A second registration of the same class has no effect.

    Raises:
        SpecError: another class of the family has this kind; the message names both.
    """
    if not isinstance(spec_class, type):
        raise SpecError(f"sma.register takes a class, not {quote(spec_class)}; write @sma.register above the class")
    if not hasattr(spec_class, "family"):
        raise SpecError(f"{spec_class.__name__} has no family; derive it from SubModuleSpec, RouterSpec, NormSpec, …")
    if "family" in spec_class.__dict__:
        raise SpecError(
            f"{spec_class.__name__} is the root of the family {spec_class.family!r}; register a class derived from it"
        )
    kind = spec_class.model_fields["kind"].default if "kind" in spec_class.model_fields else None
    if not isinstance(kind, str):
        raise SpecError(f'{spec_class.__name__} has no kind; add the field  kind: Literal["my_kind"] = "my_kind"')
    family = _registry.setdefault(spec_class.family, {})
    other = family.get(kind)
    if other is not None and _full_name(other) != _full_name(spec_class):
        raise SpecError(
            f"the {spec_class.family} kind {kind!r} is registered by {_full_name(other)} and again by "
            f"{_full_name(spec_class)}; rename one of them"
        )
    family[kind] = spec_class
    if "build" in dir(spec_class):
        spec_class.build = remembering(spec_class.build)  # type: ignore[attr-defined]
    return spec_class


def _full_name(spec_class: type[Spec]) -> str:
    return f"{spec_class.__module__}.{spec_class.__qualname__}"


@cache
def _load_plugins() -> None:
    """Import every module named by the entry points of the group `sma.plugins`, ours among them."""
    for plugin in entry_points(group=PLUGINS):
        _load_plugin(plugin)
    if not _registry:
        raise SpecError(
            "no kinds are registered, because the package is not installed; run: python -m pip install -e ."
        )


def _load_plugin(plugin: EntryPoint) -> None:
    try:
        plugin.load()
    except SpecError:
        raise
    except Exception as error:  # a broken third-party plugin must not affect other kinds
        owner = plugin.dist.name if plugin.dist is not None else "an unknown distribution"
        warnings.warn(
            f"the plugin {plugin.name!r} of {owner} could not be imported: {type(error).__name__}: {error}",
            stacklevel=2,
        )


def kinds(family: str) -> dict[str, type[Spec]]:
    """Return the registered kinds of a family, in alphabetical order.

    Raises:
        SpecError: the family is unknown.
    """
    _load_plugins()
    if not isinstance(family, str) or family not in _registry:
        raise SpecError(f"unknown family {quote(family)}{did_you_mean(str(family), sorted(_registry), 'families')}")
    return dict(sorted(_registry[family].items()))


def families() -> tuple[str, ...]:
    """Return the names of the families with a registered kind."""
    _load_plugins()
    return tuple(sorted(_registry))


def find_kind(family: str, kind: str) -> type[Spec]:
    """Return the spec class of a kind.

    Raises:
        SpecError: the kind is unknown; the message lists similar and known kinds.
    """
    known = kinds(family)
    if not isinstance(kind, str) or kind not in known:
        raise SpecError(f"unknown {family} kind {quote(kind)}{did_you_mean(str(kind), known, 'known kinds')}")
    return known[kind]


def read_spec_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file into a mapping, without validating it.

    Raises:
        SpecError: it cannot be read, or its content is not a mapping.
    """
    try:
        content = read_file(path, 4 * LIMIT, SpecError)
    except SpecError as error:
        raise SpecError(f"{error}; give the path of a YAML or JSON file") from None
    return read_fields(content, str(path))


Source = str | Path | Mapping[str, Any]


@overload
def load_spec(
    source: "Source | ModelSpec", family: Literal["model"] = "model", overrides: Settings = ()
) -> "ModelSpec": ...
@overload
def load_spec(
    source: "Source | SubModuleSpec", family: Literal["sub-module"], overrides: Settings = ()
) -> "SubModuleSpec": ...
@overload
def load_spec(source: "Source | RouterSpec", family: Literal["router"], overrides: Settings = ()) -> "RouterSpec": ...
@overload
def load_spec(source: "Source | NormSpec", family: Literal["norm"], overrides: Settings = ()) -> "NormSpec": ...
@overload
def load_spec(
    source: "Source | EncoderSpec", family: Literal["encoder"], overrides: Settings = ()
) -> "EncoderSpec": ...
@overload
def load_spec(source: "Source | HeadSpec", family: Literal["head"], overrides: Settings = ()) -> "HeadSpec": ...
@overload
def load_spec(source: Source | Spec, family: str, overrides: Settings = ()) -> Any: ...
def load_spec(source: Source | Spec, family: str = "model", overrides: Settings = ()) -> Any:
    """Validate a spec of a family from a YAML or JSON file or from a mapping.

    Args:
        source: path of a file, a mapping, or a spec.
        family: family of the spec: `model`, `sub-module`, `router`, …
        overrides: values to set before validation, by field path: `{"layers.layer.modules.attention.window": 64}`, or
            a list of settings: `["layers.layer.modules.attention.window=64"]`.

    Returns:
        an instance of the registered spec class.

    Raises:
        SpecError: the file cannot be read, or the spec is wrong; the message has one sentence per wrong field.
    """
    root = _root(family)
    if not isinstance(source, str | Path | Mapping | Spec):
        raise SpecError(f"a spec is read from a path or a mapping, not from {quote(source)}")
    data: Any = read_spec_file(source) if isinstance(source, str | Path) else source
    values = parse_settings(overrides)
    try:
        return root._resolve(override(root, data, values) if values else data)
    except (ValidationError, RecursionError) as error:
        raise spec_error(error) from None
    except PydanticCustomError as error:
        raise SpecError(error.message()) from None


def _root(family: str) -> type[Spec]:
    if not isinstance(family, str):
        raise SpecError(f"a family is a name, such as 'model', not {quote(family)}; families: {', '.join(families())}")
    example = next(iter(kinds(family).values()))
    return next(base for base in example.__mro__ if "family" in base.__dict__)


def dump_spec(spec: Spec) -> dict[str, Any]:
    """Return a spec as plain data with all defaults; `load_spec` restores the spec."""
    if not isinstance(spec, Spec):
        raise SpecError(f"dump_spec takes a spec, not {quote(spec)}; write load_spec(…), or model.spec")
    return spec.model_dump(mode="json")


def dump_yaml(spec: Spec) -> str:
    """Return a spec as YAML with all defaults."""
    return write_yaml(dump_spec(spec))


def json_schema(family: str = "model") -> dict[str, Any]:
    """Return one JSON schema for a family, with the definitions of every registered kind of every family.

    Editors can complete and check spec files with it.
    """
    definitions: dict[str, Any] = {}
    for name in families():
        for kind, spec_class in kinds(name).items():
            schema = spec_class.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(schema.pop("$defs", {}))
            definitions[f"{name}:{kind}"] = schema
        definitions[name] = {"oneOf": [{"$ref": f"#/$defs/{name}:{kind}"} for kind in kinds(name)]}
    if not isinstance(family, str) or family not in definitions:
        raise SpecError(f"unknown family {quote(family)}{did_you_mean(str(family), families(), 'families')}")
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{family}",
        "$defs": definitions,
    }
    return cast(dict[str, Any], json.loads(json.dumps(document), object_hook=_link_family))


def _link_family(node: dict[str, Any]) -> dict[str, Any]:
    family = node.pop("x-family", None)
    return {**node, "$ref": f"#/$defs/{family}"} if family is not None else node
