"""YAML text: read by the core schema of YAML 1.2 within bounds, and written unambiguously for YAML 1.1 and 1.2.

JSON is included, and so are merge keys (`<<`), which YAML 1.2 dropped. Other rules of YAML 1.1 do not apply: `yes`,
`on`, `1_000`, `12:30` and `2001-01-01` are words, and `1e-3` is a number.
"""

import re
from typing import Any, cast

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from sma.errors import SpecError, parsing, quote, reason

LIMIT = 1 << 20
"""Maximum number of characters of a text."""
NODES = 50_000
"""Maximum number of values of a text, with aliases expanded."""
DEPTH = 64
"""Maximum nesting depth of lists and mappings."""
NUMBER = 100
"""Maximum number of characters of a number."""

_CORE = "tag:yaml.org,2002:"
_MERGE = f"{_CORE}merge"
_DIGITS = r"[-+]?[0-9]+"
_WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
_FORMS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (rf"{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        rf"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE]{_DIGITS})?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+.0123456789",
    ),
}
_PATTERNS = {f"{_CORE}{name}": re.compile(rf"(?:{form})\Z") for name, (form, _) in _FORMS.items()}


class _Problem(yaml.MarkedYAMLError):
    """Well-formed YAML that is not allowed in specs."""

    def __init__(self, problem: str, node: yaml.Node | yaml.Event) -> None:
        super().__init__(problem=problem, problem_mark=cast(yaml.Mark, node.start_mark))


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Loads plain data from a text, with limits that are checked while nodes are composed."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.level = self.composed = 0
        self.extents: dict[int, tuple[int, int]] = {}  # number of values and depth of finished nodes, aliases expanded

    def scan_to_next_token(self) -> None:
        super().scan_to_next_token()
        while self.flow_level and self.peek() == "\t":
            # JSON may be indented with tabs, which PyYAML does not support.
            self.forward()
            super().scan_to_next_token()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.extents:
                raise _Problem(f"the alias {quote('*' + str(event.anchor))} is inside its own value", event)
            return node
        self.level += 1
        self.composed += 1
        if self.level > DEPTH:
            raise _Problem(f"lists and mappings are nested more than {DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self.level -= 1
        children = [id(child) for child in _children(node)]
        count = 1 + sum(self.extents[child][0] for child in children)
        depth = 1 + max((self.extents[child][1] for child in children), default=0)
        if count > NODES or self.composed > NODES:
            raise _Problem(f"there are more than {NODES:,} values, aliases expanded", event)
        if depth > DEPTH:
            raise _Problem(f"with aliases expanded, lists and mappings are nested more than {DEPTH} deep", event)
        self.extents[id(node)] = count, depth
        return node

    def value(self, node: yaml.Node | None) -> Any:
        """The plain data of a node."""
        if node is None:
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node.tag != (f"{_CORE}seq" if isinstance(node, yaml.SequenceNode) else f"{_CORE}map"):
            raise _unknown_tag(node)
        return [self.value(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else self._mapping(node)

    def _mapping(self, node: yaml.Node) -> dict[str, Any]:
        merged: dict[str, Any] | None = None
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                if merged is not None:
                    raise _Problem("the key '<<' is repeated in one mapping; write <<: [*one, *other]", key_node)
                merged = self._merged(value_node)
                continue
            key = self.value(key_node)
            if not isinstance(key, str):
                raise _Problem(f"the key {quote(key)} must be a word; put it in quotes if it is a name", key_node)
            if key in own:
                raise _Problem(f"the key {quote(key)} is repeated in one mapping", key_node)
            own[key] = self.value(value_node)
        return {**(merged or {}), **own}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """The value of `<<`: a mapping, or a list of mappings, of which earlier ones take precedence."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.MappingNode) for part in parts):
            raise _Problem("'<<' takes a mapping, or a list of mappings", node)
        return {key: value for part in reversed(parts) for key, value in self._mapping(part).items()}


class _Dumper(yaml.SafeDumper):
    """Quotes words that YAML 1.1 or 1.2 would read as a number, true, false or null."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Escaped where a character is not printable: PyYAML folds some of these to blanks.
    return dumper.represent_scalar(f"{_CORE}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern in _PATTERNS.items():
    _first = list(_FORMS[_tag.removeprefix(_CORE)][1])
    _Loader.add_implicit_resolver(_tag, _pattern, [*_first, *([""] if _pattern.match("") else [])])
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _scalar(node: yaml.ScalarNode) -> Any:
    text, pattern = node.value, _PATTERNS.get(node.tag)
    if node.tag in (f"{_CORE}str", _MERGE):
        return _whole_characters(node)
    if pattern is None:
        raise _unknown_tag(node)
    if len(text) > NUMBER:
        raise _Problem(f"{quote(text)} has {len(text):,} characters; no number in a spec has more than {NUMBER}", node)
    if not pattern.match(text):
        raise _Problem(f"{quote(text)} is not !!{node.tag.removeprefix(_CORE)}", node)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if node.tag == f"{_CORE}float":
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _whole_characters(node: yaml.ScalarNode) -> str:
    r"""The text of a node; JSON writes a character beyond the first 65,536 as two escapes, such as `\ud83d\ude00`."""
    text = str(node.value)
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise _Problem(f"{quote(text)} holds half of a character", node) from None


def _unknown_tag(node: yaml.Node) -> _Problem:
    tag = node.tag.replace(_CORE, "!!", 1)
    return _Problem(f"the tag {quote(tag)} does not fit, or is not supported in specs; leave it out", node)


def read_yaml(content: str | bytes, where: str) -> Any:
    """Read YAML or JSON into plain data.

    Args:
        content: the text; bytes are UTF-8.
        where: name of the source in the error.

    Raises:
        SpecError: it is not valid, a key is repeated or not a text, or a limit of this module is exceeded. The message
            names the line.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{where} is not UTF-8 text; save it as UTF-8") from None
    if len(text) > LIMIT:
        raise SpecError(f"{where} has {len(text):,} characters; no spec has more than {LIMIT:,}")
    with parsing(where, SpecError):
        try:
            loader = _Loader(text)
            return loader.value(loader.get_single_node())
        except yaml.YAMLError as error:
            raise SpecError(f"{where} is not valid YAML: {_explained(error, text)}") from None


def read_fields(content: str | bytes, where: str) -> dict[str, Any]:
    """Read YAML or JSON that holds a mapping of fields; see `read_yaml`.

    Raises:
        SpecError: as there, or it holds something else.
    """
    data = read_yaml(content, where)
    if not isinstance(data, dict):
        raise SpecError(
            f"{where} must hold a mapping of fields, not {type(data).__name__}; its first line is usually 'kind: …'"
        )
    return data


def _explained(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"the character #x{ord(text[error.position]):04x} is not allowed (line {line})"
    if not isinstance(error, yaml.MarkedYAMLError):
        return reason(error)
    words = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    return f"{reason(ValueError(words))}{f' (line {mark.line + 1})' if mark is not None else ''}"


def write_yaml(data: Any) -> str:
    """Return plain data as YAML with the same meaning in YAML 1.1 and 1.2."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
