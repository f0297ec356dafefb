"""The list of mutations is valid: texts and test files exist. `make mutations` applies them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_text_and_the_tests_of_every_mutation_exist() -> None:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / ".ci" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    mutations = program.load()  # raises if a text does not occur exactly once
    assert len(mutations) >= 30
    assert len({mutation["name"] for mutation in mutations}) == len(mutations)
    assert [test for each in mutations for test in each["tests"] if not (ROOT / test.split("::")[0]).is_file()] == []
