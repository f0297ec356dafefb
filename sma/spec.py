"""Specs: typed, validated, serialisable descriptions from which parts are built, and the registry of their kinds."""

import json
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Never, Self, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from sma.errors import SpecError, did_you_mean
from sma.memory import within_memory
from sma.parts import remembering
from sma.paths import override

__all__ = ["FrozenDict", "Spec", "dump_spec", "find_kind", "json_schema", "kinds", "load_spec", "read_spec_file", "register"]

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

PLUGINS = "sma.plugins"

_registry: dict[str, dict[str, type["Spec"]]] = {}


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot be changed after it is made, so that a spec is frozen all the way down."""

    def _refuse(self, *args: object, **kwargs: object) -> Never:
        raise TypeError("specs are frozen: make a changed copy with spec.replace(field=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))  # dictionaries of another order are equal

    def __reduce__(self) -> tuple[type["FrozenDict"], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


Value = TypeVar("Value")
FrozenMapping = Annotated[dict[str, Value], AfterValidator(FrozenDict)]


class _SpecMeta(ModelMetaclass):
    """Turns the validation error of a direct construction, `GAUSpec(window=0)`, into one `SpecError`."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise _spec_error(error) from None


class Spec(BaseModel, metaclass=_SpecMeta):
    """Base of every spec: frozen, without unknown keys, without infinities or NaN.

    A class that names a `family` is the root of a family of kinds (sub-modules, routers, norms …). A field annotated with
    the root accepts every registered kind of the family: an instance, or a mapping whose `kind` says which class it is.

    Raises:
        SpecError: one sentence per wrong field, with its path in the spec.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants")

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
            # Outermost, so that the cross-field checks of a class are explained too.
            return core_schema.no_info_wrap_validator_function(cls._explain, handler(source))
        return core_schema.no_info_plain_validator_function(
            cls._resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(_serialise, info_arg=True),
            metadata={"pydantic_js_functions": [lambda _schema, _handler: {"x-family": cls.family}]},
        )

    @classmethod
    def concrete(cls, data: Mapping[str, Any]) -> "type[Spec] | None":
        """The class that a mapping describes: this one, or the kind it names; None for a kind nobody registered."""
        if "family" not in cls.__dict__:
            return cls
        return kinds(cls.family).get(data.get("kind", cls.default_kind))

    @classmethod
    def _resolve(cls, data: Any) -> "Spec":
        """Find the class of a nested spec by its `kind`, before anything else is validated."""
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise _custom(f"a {cls.family} must be a mapping with a 'kind'", f", not {data!r}; write for example {{kind: …}}")
        kind = data.get("kind", cls.default_kind)
        if kind is None:
            raise _custom(f"a {cls.family} needs a 'kind'", f"; known kinds: {', '.join(kinds(cls.family))}")
        found = cls.concrete(data) if isinstance(kind, str) else None
        if found is None:
            raise _custom(f"unknown {cls.family} kind {kind!r}", _kinds_hint(cls.family, str(kind)))
        return cast(Spec, found.__pydantic_validator__.validate_python({**data, "kind": kind}))

    @classmethod
    def _explain(cls, data: Any, handler: Any) -> Any:
        """Say what is wrong with the fields of this class in sentences of its own; errors of nested specs pass through."""
        if isinstance(data, Mapping):
            fields = [name for name in cls.model_fields if name != "kind"]
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if unknown:
                names = ", ".join(repr(key) for key in unknown)
                word = "field" if len(unknown) == 1 else "fields"
                raise _custom(cls.__name__, f": unknown {word} {names}{did_you_mean(unknown[0], fields, 'fields')}")
        try:
            return handler(data)
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, [_explained(cls, item) for item in error.errors()]) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate a mapping or an instance; the same as pydantic's, with a `SpecError`."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _spec_error(error) from None

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _serialise(value: Spec, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode, exclude_none=info.exclude_none, exclude_defaults=info.exclude_defaults)


def _custom(head: str, tail: str) -> PydanticCustomError:
    # Two halves, because the path of the field stands between them and is known only at the top.
    return PydanticCustomError("sma", "{head}{tail}", {"head": head, "tail": tail})


_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def _explained(cls: type[Spec], item: Any) -> InitErrorDetails:
    """One pydantic error as one of ours: the class, the field, what was given, what is required, what the field means."""
    loc, given = item["loc"], item["input"]
    if item["type"] == "sma":
        problem = _custom(item["ctx"]["head"], item["ctx"]["tail"])
        return InitErrorDetails(type=problem, loc=loc, input=given)
    name = str(loc[0]) if loc else ""
    field = cls.model_fields.get(name)
    meaning = f"; {name}: {field.description}" if field is not None and field.description else ""
    context = item.get("ctx", {})
    bound = next((f"must be {words} {context[key]}" for key, words in _BOUNDS.items() if key in context), None)
    if item["type"] == "missing":
        sentence = f"{name!r} is required{meaning}"
    elif item["type"] == "value_error":
        sentence = item["msg"].removeprefix("Value error, ")
    elif bound and len(loc) == 1:
        sentence = f"{name}={given!r} {bound}{meaning}"
    elif item["type"] == "literal_error":
        near = did_you_mean(str(given), [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")])
        sentence = f"{name}={given!r} must be {context['expected']}{near}{meaning}"
    else:
        sentence = f"{f'{name}=' if name else ''}{given!r}: {item['msg'][0].lower()}{item['msg'][1:]}{meaning}"
    # The sentence names the field; the path then says only in which part of the spec it stands.
    return InitErrorDetails(type=_custom(cls.__name__, f": {sentence}"), loc=() if len(loc) <= 1 else loc[:-1], input=given)


def _spec_error(error: ValidationError) -> SpecError:
    sentences = []
    for item in error.errors():
        where = field_path(item["loc"])
        context = item.get("ctx", {"head": item["msg"], "tail": ""})
        sentences.append(f"{context['head']}{f' in {where}' if where else ''}{context['tail']}")
    return SpecError("\n".join(dict.fromkeys(sentences)))


def field_path(parts: tuple[int | str, ...]) -> str:
    """Write a location as a path: `("layers", 2, "modules")` is `layers[2].modules`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


Registered = TypeVar("Registered", bound=Spec)


def register(spec_class: type[Registered]) -> type[Registered]:
    """Class decorator: make a kind known to YAML, the command line, the JSON schema, the conformance kit and sweeps.

    Registering the same class again is harmless.

    Raises:
        SpecError: the kind is taken by another class of the family; both places are named.
    """
    if not hasattr(spec_class, "family"):
        raise SpecError(f"{spec_class.__name__} belongs to no family; derive it from SubModuleSpec, RouterSpec, NormSpec, …")
    if "family" in spec_class.__dict__:
        raise SpecError(f"{spec_class.__name__} is the root of the family {spec_class.family!r}; register a class derived from it")
    kind = spec_class.model_fields["kind"].default if "kind" in spec_class.model_fields else None
    if not isinstance(kind, str):
        raise SpecError(f'{spec_class.__name__} names no kind; add the field  kind: Literal["my_kind"] = "my_kind"')
    family = _registry.setdefault(spec_class.family, {})
    other = family.get(kind)
    if other is not None and _place(other) != _place(spec_class):
        raise SpecError(
            f"the {spec_class.family} kind {kind!r} is registered by {_place(other)} and again by {_place(spec_class)}; rename one of them"
        )
    family[kind] = spec_class
    if "build" in dir(spec_class):
        spec_class.build = remembering(spec_class.build)  # type: ignore[attr-defined]
    return spec_class


def _place(spec_class: type[Spec]) -> str:
    return f"{spec_class.__module__}.{spec_class.__qualname__}"


@cache
def _load_plugins() -> None:
    """Import every module named by the entry points of the group `sma.plugins`, ours among them."""
    for plugin in entry_points(group=PLUGINS):
        _load_plugin(plugin)
    if not _registry:
        raise SpecError("no kinds are registered, because the package is not installed; run: python -m pip install -e .")


def _load_plugin(plugin: EntryPoint) -> None:
    try:
        plugin.load()
    except SpecError:
        raise
    except Exception as error:  # a broken plugin of somebody else must not take the whole framework down
        owner = plugin.dist.name if plugin.dist is not None else "an unknown distribution"
        warnings.warn(f"the plugin {plugin.name!r} of {owner} could not be imported: {type(error).__name__}: {error}", stacklevel=2)


def kinds(family: str) -> dict[str, type[Spec]]:
    """Return the registered kinds of a family, in alphabetical order.

    Raises:
        SpecError: there is no such family.
    """
    _load_plugins()
    if family not in _registry:
        raise SpecError(f"unknown family {family!r}{did_you_mean(family, sorted(_registry), 'families')}")
    return dict(sorted(_registry[family].items()))


def families() -> tuple[str, ...]:
    """Return the names of the families that have a registered kind."""
    _load_plugins()
    return tuple(sorted(_registry))


def find_kind(family: str, kind: str) -> type[Spec]:
    """Return the spec class of a kind.

    Raises:
        SpecError: the kind is unknown; near matches and the known kinds are listed.
    """
    known = kinds(family)
    if kind not in known:
        raise SpecError(f"unknown {family} kind {kind!r}{_kinds_hint(family, kind)}")
    return known[kind]


def _kinds_hint(family: str, kind: str) -> str:
    return did_you_mean(kind, kinds(family), "known kinds")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML with an error for a key that stands twice in one mapping: the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice in one mapping (line {line})")
            seen.add(key) if isinstance(key, str) else None
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Read YAML (JSON is a part of it); `where` names the source in the error."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_spec_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file into a mapping, without validating it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot read the spec {str(path)!r}: {reason}; give the path of a YAML or JSON file") from None
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise SpecError(f"{path} must hold a mapping of fields, not {type(data).__name__}; its first line is usually 'kind: …'")
    return data


def parse_setting(setting: str) -> tuple[str, Any]:
    """Split `path=value`, as `--set` takes it; the value is YAML, so `null`, `[1, 2]` and `{kind: never}` work.

    Raises:
        SpecError: there is no `=`, or the value is not YAML.
    """
    path, equals, value = setting.partition("=")
    if not equals:
        raise SpecError(f"--set {setting!r} has no '='; write --set path=value, such as --set width=32")
    return path.strip(), read_yaml(value, f"the value of --set {path.strip()}")


def load_spec(source: str | Path | Mapping[str, Any], family: str = "model", overrides: Mapping[str, Any] | None = None) -> Any:
    """Validate a spec of a family from a YAML or JSON file or from a mapping.

    Args:
        source: path of a file, or the mapping itself.
        family: what the spec describes: `model`, `sub-module`, `router`, …
        overrides: values to set first, by field path: `{"layers.layer.modules.attention.window": 64}`.

    Returns:
        an instance of the registered spec class.

    Raises:
        SpecError: the file cannot be read, or the spec is wrong; one sentence per wrong field.
    """
    data = source if isinstance(source, Mapping) else read_spec_file(source)
    root = _root(family)
    if overrides:
        data = override(root, data, overrides)
    try:
        return root._resolve(data)
    except ValidationError as error:
        raise _spec_error(error) from None
    except PydanticCustomError as error:
        raise SpecError(error.message()) from None


def _root(family: str) -> type[Spec]:
    example = next(iter(kinds(family).values()))
    return next(base for base in example.__mro__ if "family" in base.__dict__)


def dump_spec(spec: Spec) -> dict[str, Any]:
    """Return a spec as plain data, every default written out; `load_spec` gives the same spec back."""
    return spec.model_dump(mode="json")


def dump_yaml(spec: Spec) -> str:
    """Return a spec as YAML, every default written out."""
    return yaml.safe_dump(dump_spec(spec), sort_keys=False, allow_unicode=True, width=120)


def json_schema(family: str = "model") -> dict[str, Any]:
    """Return one JSON schema for a family, with the definitions of every registered kind of every family.

    Editors use it to complete and check spec files.
    """
    definitions: dict[str, Any] = {}
    for name in families():
        for kind, spec_class in kinds(name).items():
            schema = spec_class.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(schema.pop("$defs", {}))
            definitions[f"{name}:{kind}"] = schema
        definitions[name] = {"oneOf": [{"$ref": f"#/$defs/{name}:{kind}"} for kind in kinds(name)]}
    if family not in definitions:
        raise SpecError(f"unknown family {family!r}{did_you_mean(family, families(), 'families')}")
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": f"#/$defs/{family}", "$defs": definitions}
    return cast(dict[str, Any], json.loads(json.dumps(document), object_hook=_link_family))


def _link_family(node: dict[str, Any]) -> dict[str, Any]:
    family = node.pop("x-family", None)
    return {**node, "$ref": f"#/$defs/{family}"} if family is not None else node
