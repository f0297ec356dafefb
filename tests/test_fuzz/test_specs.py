"""Malformed specs, experiments, sweeps, settings and command lines are read or refused with an error."""

import copy
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from sma.__main__ import main
from sma.errors import SpecError
from sma.recipes.experiment import load_experiment
from sma.spec import load_spec
from sma.tune.sweep import make_sweep
from tests.test_fuzz.harness import Target, fuzz, mutate


def _texts(package: str, folder: str) -> dict[str, str]:
    entries = files(package).joinpath(folder).iterdir()
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(entries, key=lambda entry: entry.name)
    }


SPECS, EXPERIMENTS, SWEEPS = (
    _texts("sma.recipes", "specs"),
    _texts("sma.recipes", "presets"),
    _texts("sma.tune", "presets"),
)

# Values as YAML text, with % in place of spaces.
SCALARS = [
    word.replace("%", " ")
    for line in (
        (
            "0 -1 1 2 3 1e-3 1e20 1e400 -1e308 0.5 .5 1. "
            "5e-324 9223372036854775807 9223372036854775808 -9223372036854775809 10001 1e4"
        ),
        (
            "0x10 0o17 01750 0x_ 1_000 12:30 true false yes on null ~ .inf -.inf .nan 2001-99-99 2001-01-01 '' '1' "
            "'a%b' gau sma conv"
        ),
        (
            "!!int%x !!int%5 !!float%1 !!binary%aa !!python/object:os.system%{} !!set%{a} !!str%1 "
            "!!timestamp%2001-01-01 *a &a%[*a] [] {}"
        ),
        (
            "[[]] {a:%1} {kind:%sma} {kind:%[a]} {kind:%gau,%query_size:%4,%hidden_size:%4} {repeat:%3,%layer:%{}} "
            "{<<:%{a:%1}} {1:%2}"
        ),
        (
            "{kind:%rms_norm} {kind:%choice,%values:%[1e-3,%4e-3]} {kind:%choice,%values:%[1]} "
            "{kind:%int,%low:%1,%high:%4} {kind:%attention}"
        ),
        (
            "{kind:%uniform,%low:%-1e308,%high:%1e308} {kind:%loguniform,%low:%1e-320,%high:%1e308} "
            "{kind:%fixed,%value:%{}} <<:%1 %YAML%1.1"
        ),
        '{kind:%quniform,%low:%0,%high:%1e300,%step:%1e-300} "\\ud800" "\\ud83d\\ude00" "\\0" \0 \t \ufeff \udcff',
    )
    for word in line.split(" ")
]
LONG: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: "9" * rng.choice((99, 101, 5000)),
    lambda rng: "x" * rng.choice((200, 2000, 100_000)),
    lambda rng: "[" * rng.choice((70, 3000)),
    lambda rng: "{a: " * rng.choice((70, 3000)),
    lambda rng: "[" * 60 + "]" * 60,
    lambda rng: f"[{'1, ' * rng.choice((2000, 20_000))}]",
    lambda rng: f"{{{', '.join(f'a{number}: {number}' for number in range(rng.choice((200, 5000))))}}}",
    lambda rng: (
        "[&a0 [1], "
        + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, rng.choice((3, 8, 30))))
        + "]"
    ),
)


def _scalar(rng: random.Random) -> str:
    return rng.choice(LONG)(rng) if rng.random() < 0.15 else rng.choice(SCALARS)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container in plain data with each of its keys."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(node, key), *_places(value)]]


def _written(data: Any, raw: dict[str, str]) -> str:
    text = yaml.safe_dump(data, sort_keys=False, width=10**9, default_flow_style=True)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    return text


def _structural(rng: random.Random, text: str) -> str:
    """A YAML text whose parts are removed, copied, exchanged, renamed or replaced."""
    data, raw = yaml.safe_load(text), {}
    for number in range(rng.randint(1, 3)):
        places = _places(data)
        if not places:
            break
        node, key = rng.choice(places)
        way = rng.randrange(6)
        if way == 0:
            del node[key]
        elif way == 1:
            other, at = rng.choice(places)
            node[key] = copy.deepcopy(other[at])
        elif way == 2 and isinstance(node, dict):
            node[rng.choice(["kind", "on", "x" * 300, "modules", "layer", "repeat", str(key) + "x", ""])] = node.pop(
                key
            )
        elif way == 3 and isinstance(node, list):
            node.extend([copy.deepcopy(node[key]) for _ in range(rng.choice((1, 50)))])
        else:
            mark = f"MARK{number}X"
            node[key] = mark
            raw[mark] = _scalar(rng)
    return _written(data, raw)


def _malformed(rng: random.Random, texts: dict[str, str]) -> bytes:
    text = rng.choice(list(texts.values()))
    if rng.random() < 0.6:
        text = _structural(rng, text)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        content = mutate(rng, content)
    return (
        content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig")))
        if rng.random() < 0.03
        else content
    )


def _file(texts: dict[str, str]) -> Callable[[random.Random, Path], Path]:
    def make(rng: random.Random, folder: Path) -> Path:
        path = folder / rng.choice(("spec.yaml", "spec.json"))
        path.write_bytes(_malformed(rng, texts))
        return path

    return make


PATHS = [
    *(
        "width",
        "seed",
        "model",
        "model.width",
        "layers",
        "layers.repeat",
        "layers.layer",
        "layers[0]",
        "layers[0].norm",
        "sinusoid",
        "space",
    ),
    *(
        "layers.layer.router",
        "layers.layer.router.kind",
        "layers.layer.modules",
        "layers.layer.modules.x.kind",
        "layers.layer.norm.epsilon",
    ),
    *(
        "layers.layer.modules.attention.window",
        "layers.layer.modules.attention.position.max_positions",
        "layers[99999999999]",
        "samples",
    ),
    *(
        "encoder.kind",
        "encoder.vocabulary",
        "head",
        "head.classes",
        "kind",
        "final_norm.kind",
        "training.updates",
        "training.learning_rate",
    ),
    *(
        "training.budget.anneal",
        "training.losses.target",
        "task.kind",
        "task.data.train",
        "a..b",
        "[",
        "]",
        ".",
        "a[",
        "a[-1]",
        "width.x",
    ),
]


GOOD = [
    "seed=7",
    "training.batch_size=4",
    "training.weight_decay=1e-4",
    "training.clip_norm=null",
    "model.width=32",
    "precision=64-true",
]


def _setting(rng: random.Random) -> str:
    path = rng.choice(PATHS)
    chance = rng.random()
    if chance > 0.7:
        return rng.choice(GOOD)
    if chance < 0.1:
        path = "".join(rng.choice("ab.[]01²\0é ") for _ in range(rng.randint(0, 12)))
    elif chance < 0.15:
        path = rng.choice(("a." * 5000, "x" * 100_000, f"layers[{'9' * 5000}]", "layers" + "[0]" * 2000))
    return f"{path}{rng.choice(('=', '=', '=', '=', '', '=='))}{_scalar(rng)}"


def _with_settings(names: list[str]) -> Callable[[random.Random, Path], tuple[str, list[str]]]:
    return lambda rng, folder: (rng.choice(names), [_setting(rng) for _ in range(rng.randint(1, 3))])


def _command(rng: random.Random, folder: Path) -> list[str]:
    texts = rng.choice((SPECS, EXPERIMENTS, SWEEPS))
    sources = [str(_file(texts)(rng, folder)), rng.choice([*SPECS, *EXPERIMENTS]), str(folder), "a\0b", "x" * 5000]
    words = [rng.choices(("validate", "describe"), (3, 1))[0], rng.choices(sources, (10, 5, 1, 1, 1))[0]]
    return [*words, *(word for _ in range(rng.randint(0, 2)) for word in ("--set", _setting(rng)))]


def _run(words: list[str]) -> None:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    if status == 2 and err.getvalue().startswith("error: "):
        raise SpecError(err.getvalue())
    if status:
        raise RuntimeError(f"status {status}: {err.getvalue()}")


SPEC_FILES = Target(_file(SPECS), load_spec)
EXPERIMENT_FILES = Target(_file(EXPERIMENTS), load_experiment)
SWEEP_FILES = Target(_file(SWEEPS), make_sweep)
SETTINGS = Target(_with_settings(list(EXPERIMENTS)), lambda given: load_experiment(*given))
SWEEP_SETTINGS = Target(_with_settings(list(SWEEPS)), lambda given: make_sweep(given[0], settings=given[1]))
COMMANDS = Target(_command, _run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("SPEC_FILES", 300),
        ("EXPERIMENT_FILES", 200),
        ("SWEEP_FILES", 40),
        ("SETTINGS", 200),
        ("SWEEP_SETTINGS", 20),
        ("COMMANDS", 80),
    ],
)
def test_malformed_input_is_read_or_refused(target: str, cases: int) -> None:
    counts = fuzz(f"{__name__}:{target}", cases)
    print(target, counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
