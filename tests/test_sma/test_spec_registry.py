"""The registry of kinds: registration, errors and plugins."""

import warnings
from importlib.metadata import EntryPoint
from typing import Literal

import pytest
from pydantic import Field

import sma.spec
from sma import SubModuleSpec, load_spec, register
from sma.errors import SpecError
from sma.modules.gau import GAUSpec
from sma.norms import NormSpec
from sma.routers import RouterSpec, SMARouterSpec
from sma.spec import Spec, dump_spec, find_kind, kinds


@pytest.fixture
def registry(monkeypatch):
    """A registry that drops the kinds of a test at its end."""
    kinds("model")
    monkeypatch.setattr(
        sma.spec, "_registry", {family: dict(members) for family, members in sma.spec._registry.items()}
    )


@pytest.mark.usefixtures("registry")
class TestRegistry:
    def test_a_registered_kind_is_available_everywhere(self):
        @register
        class ShiftSpec(SubModuleSpec):
            kind: Literal["shift"] = "shift"
            by: int = Field(default=1, description="how far")

        layers = [{"modules": {"shift": {"kind": "shift", "by": 3}}}]
        spec = load_spec({"kind": "sequence_encoder", "width": 4, "encoder": {"kind": "real_number"}, "layers": layers})
        assert spec.layer_specs[0].modules["shift"] == ShiftSpec(by=3)
        assert load_spec(dump_spec(spec)) == spec
        assert "sub-module:shift" in sma.spec.json_schema()["$defs"]
        assert list(kinds("sub-module")) == sorted(kinds("sub-module"))
        with pytest.raises(SpecError, match=r"unknown sub-module kind 'shft'; did you mean 'shift'\?"):
            find_kind("sub-module", "shft")

    def test_registering_the_same_class_again_is_harmless(self):
        assert register(GAUSpec) is GAUSpec
        assert kinds("sub-module")["gau"] is GAUSpec

    def test_a_reloaded_class_replaces_the_old_one(self):
        """A notebook cell that runs twice defines another class with the same full name."""
        made = []
        for default in (1, 2):

            @register
            class NoteSpec(SubModuleSpec):
                kind: Literal["note"] = "note"
                size: int = default

            made.append(NoteSpec)
        assert kinds("sub-module")["note"] is made[1]

    def test_another_class_under_the_same_kind_names_both_places(self):
        class OtherSpec(SubModuleSpec):
            kind: Literal["gau"] = "gau"

        with pytest.raises(
            SpecError,
            match=r"the sub-module kind 'gau' is registered by sma\.modules\.gau\.GAUSpec and again by "
            r".*test_spec_registry\..*OtherSpec",
        ):
            register(OtherSpec)
        assert kinds("sub-module")["gau"] is GAUSpec

    def test_one_kind_may_exist_in_two_families(self):
        @register
        class SMANormSpec(NormSpec):
            kind: Literal["sma"] = "sma"

        assert kinds("norm")["sma"] is SMANormSpec
        assert kinds("router")["sma"] is SMARouterSpec

    def test_class_without_a_kind(self):
        class NamelessSpec(SubModuleSpec):
            pass

        with pytest.raises(
            SpecError, match=r"NamelessSpec has no kind; add the field  kind: Literal\[\"my_kind\"\] = \"my_kind\""
        ):
            register(NamelessSpec)

    def test_class_without_a_family(self):
        class LonelySpec(Spec):
            kind: Literal["lonely"] = "lonely"

        with pytest.raises(
            SpecError, match="LonelySpec has no family; derive it from SubModuleSpec, RouterSpec, NormSpec, …"
        ):
            register(LonelySpec)

    def test_root_of_a_family(self):
        with pytest.raises(
            SpecError, match="RouterSpec is the root of the family 'router'; register a class derived from it"
        ):
            register(RouterSpec)

    @pytest.mark.parametrize("method", ["build", "num_parameters", "macs"])
    def test_incomplete_kind_is_refused(self, method):
        class HalfSpec(SubModuleSpec):
            kind: Literal["half"] = "half"

        with pytest.raises(
            TypeError,
            match=rf"HalfSpec must define {method}\(self, width.*\); see CONTRIBUTING\.md, 'A sub-module in one file'",
        ):
            getattr(HalfSpec(), method)(*[4, 4][: 2 if method == "macs" else 1])

    def test_incomplete_router_is_refused(self):
        class HalfSpec(RouterSpec):
            kind: Literal["half"] = "half"

        with pytest.raises(TypeError, match=r"HalfSpec must define build\(self, width, names\)"):
            HalfSpec().build(4, ["a"])
        with pytest.raises(TypeError, match=r"HalfSpec must define num_parameters\(self, width, modules\)"):
            HalfSpec().num_parameters(4, 1)


class TestPlugins:
    def _plugin(self, tmp_path, monkeypatch, name: str, code: str) -> EntryPoint:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return EntryPoint(name, name, sma.spec.PLUGINS)

    def test_broken_plugin_warns_and_affects_nothing_else(self, tmp_path, monkeypatch):
        plugin = self._plugin(tmp_path, monkeypatch, "plugin_broken", "raise OSError('no driver')")
        with pytest.warns(
            UserWarning,
            match="the plugin 'plugin_broken' of an unknown distribution could not be imported: OSError: no dri",
        ):
            sma.spec._load_plugin(plugin)

    @pytest.mark.usefixtures("registry")
    def test_importing_a_plugin_registers_its_kinds(self, tmp_path, monkeypatch):
        code = """
from typing import Literal
from sma import SubModuleSpec, register
@register
class PlugSpec(SubModuleSpec):
    kind: Literal["plug"] = "plug"
"""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sma.spec._load_plugin(self._plugin(tmp_path, monkeypatch, "plugin_fine", code))
        assert load_spec({"kind": "plug"}, "sub-module").kind == "plug"

    @pytest.mark.usefixtures("registry")
    def test_plugin_that_redefines_a_built_in_kind_is_refused(self, tmp_path, monkeypatch):
        code = """
from typing import Literal
from sma import SubModuleSpec, register
@register
class ThiefSpec(SubModuleSpec):
    kind: Literal["gau"] = "gau"
"""
        with pytest.raises(
            SpecError,
            match=r"the sub-module kind 'gau' is registered by sma\.modules\.gau\.GAUSpec and again by plugin_th",
        ):
            sma.spec._load_plugin(self._plugin(tmp_path, monkeypatch, "plugin_thief", code))

    def test_a_package_that_is_not_installed_gives_an_error_message(self, monkeypatch):
        monkeypatch.setattr(sma.spec, "_registry", {})
        monkeypatch.setattr(sma.spec, "entry_points", lambda group: [])
        with pytest.raises(
            SpecError,
            match=r"no kinds are registered, because the package is not installed; run: python -m pip install -e \.",
        ):
            sma.spec._load_plugins.__wrapped__()
