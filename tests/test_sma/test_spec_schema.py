"""The JSON schema: complete, without dangling references, and consistent with the specs."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma import load_spec
from sma.errors import SpecError
from sma.spec import dump_spec, families, json_schema, kinds
from tests.specs import every_kind, of_class, of_family

SCHEMA = json_schema()


def _look_up(reference: str, schema: dict[str, Any]) -> Any:
    node: Any = schema
    assert reference.startswith("#/")
    for step in reference[2:].split("/"):
        node = node[step.replace("~1", "/").replace("~0", "~")]
    return node


def fits(value: Any, rule: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether a value fits a rule; supports only the keywords of JSON schema that our schemas use."""
    known = {
        "$ref",
        "$schema",
        "$defs",
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "anyOf",
        "oneOf",
        "allOf",
    }
    known |= {
        "const",
        "enum",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minItems",
        "title",
        "description",
        "default",
    }
    known |= {"minLength", "pattern"}
    assert set(rule) <= known, set(rule) - known
    checks = [
        "$ref" not in rule or fits(value, _look_up(rule["$ref"], schema), schema),
        "type" not in rule or _is(value, rule["type"]),
        "const" not in rule or (value == rule["const"] and type(value) is type(rule["const"])),
        "enum" not in rule or value in rule["enum"],
        "anyOf" not in rule or any(fits(value, part, schema) for part in rule["anyOf"]),
        "oneOf" not in rule or sum(fits(value, part, schema) for part in rule["oneOf"]) == 1,
        "allOf" not in rule or all(fits(value, part, schema) for part in rule["allOf"]),
        "minItems" not in rule or len(value) >= rule["minItems"],
    ]
    if isinstance(value, str):
        checks += [len(value) >= rule.get("minLength", 0), re.search(rule.get("pattern", ""), value) is not None]
    if _is(value, "number"):
        checks += [
            value >= rule.get("minimum", value),
            value <= rule.get("maximum", value),
            "exclusiveMinimum" not in rule or value > rule["exclusiveMinimum"],
            "exclusiveMaximum" not in rule or value < rule["exclusiveMaximum"],
        ]
    if isinstance(value, dict):
        fields, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        checks += [name in value for name in rule.get("required", [])]
        for name, item in value.items():
            allowed = fields.get(name, others)
            checks.append(allowed if isinstance(allowed, bool) else fits(item, allowed, schema))
    if isinstance(value, list) and "items" in rule:
        checks += [fits(item, rule["items"], schema) for item in value]
    return all(checks)


def _is(value: Any, name: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": whole or (isinstance(value, float) and value.is_integer()),
        "number": whole or isinstance(value, float),
        "null": value is None,
    }[name]


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for item in node.values() for found in _references(item)]
    return [found for item in node for found in _references(item)] if isinstance(node, list) else []


def test_every_reference_has_a_definition():
    references = set(_references(SCHEMA))
    assert len(references) > 10
    for reference in references:
        assert isinstance(_look_up(reference, SCHEMA), dict)


def test_schema_is_plain_json_and_names_its_dialect():
    assert json.loads(json.dumps(SCHEMA, allow_nan=False)) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@every_kind
def test_schema_of_every_kind_describes_its_fields(family, kind):
    definition, spec_class = SCHEMA["$defs"][f"{family}:{kind}"], kinds(family)[kind]
    assert set(definition["properties"]) == set(spec_class.model_fields)
    assert definition["additionalProperties"] is False
    assert definition["properties"]["kind"]["const"] == kind
    for name, field in spec_class.model_fields.items():
        if name != "kind":
            assert field.description, f"{spec_class.__name__}.{name} says nothing about itself"
            assert definition["properties"][name]["description"] == field.description


@pytest.mark.parametrize("family", families())
def test_schema_of_a_family_contains_its_kinds(family):
    offered = {
        choice["$ref"].removeprefix(f"#/$defs/{family}:") for choice in json_schema(family)["$defs"][family]["oneOf"]
    }
    assert offered == set(kinds(family))
    assert json_schema(family)["$ref"] == f"#/$defs/{family}"


@every_kind
@given(data=st.data())
def test_every_dumped_spec_fits_the_schema(family, kind, data):
    assert fits(dump_spec(data.draw(of_class(kinds(family)[kind]))), {"$ref": f"#/$defs/{family}"}, SCHEMA)


@given(spec=of_family("model"), name=st.sampled_from(["kind", "width", "embedding_dropout", "layers", "wdith"]))
def test_data_that_the_schema_refuses_are_refused_by_load_spec(spec, name):
    wrong = {
        **dump_spec(spec),
        name: {"kind": "sequence_enc", "width": 0, "embedding_dropout": 1.0, "layers": [{"norm": 3}], "wdith": 3}[name],
    }
    assert not fits(wrong, SCHEMA, SCHEMA)
    with pytest.raises(
        SpecError, match=r"unknown model kind|width=0|dropout=1\.0|a norm must be|unknown field 'wdith'"
    ):
        load_spec(wrong)
