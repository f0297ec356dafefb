"""The list of mutations is one that can be made; `make mutations` makes them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_mutation_names_a_text_and_tests_that_are_there() -> None:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / ".ci" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    mutations = program.load()  # raises where a text does not occur once
    assert len(mutations) >= 30
    assert len({mutation["name"] for mutation in mutations}) == len(mutations)
    assert [test for each in mutations for test in each["tests"] if not (ROOT / test.split("::")[0]).is_file()] == []
