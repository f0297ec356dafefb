"""What `sma.modules` and `sma.routers` export: the class and the spec of every kind."""

from types import ModuleType

import pytest

import sma.modules
import sma.routers
from sma.spec import kinds


@pytest.mark.parametrize(
    ("package", "family"),
    [
        pytest.param(sma.modules, "sub-module", id="modules"),
        pytest.param(sma.routers, "router", id="routers"),
    ],
)
def test_every_built_in_kind_is_exported_with_its_class(package: ModuleType, family: str) -> None:
    specs = {spec for spec in kinds(family).values() if spec.__module__.startswith(f"{package.__name__}.")}
    assert specs
    assert sorted({spec.__name__ for spec in specs} - set(package.__all__)) == []
    built = {spec.build.__annotations__["return"] for spec in specs}
    assert sorted({str(getattr(name, "__name__", name)) for name in built} - set(package.__all__)) == []


@pytest.mark.parametrize("package", [sma.modules, sma.routers], ids=lambda package: package.__name__)
def test_exported_names_exist(package: ModuleType) -> None:
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
