"""Damaged and forged files of models and states are refused with an error or read as another complete one."""

import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import sma
from sma.model import SequenceModel
from sma.spec import dump_spec
from tests.test_fuzz.harness import Target, fuzz, mutate
from tests.test_sma.test_checkpoint import SPEC

GAU = {"kind": "gau", "query_size": 2, "hidden_size": 3, "bidirectional": False}
STREAM: dict[str, Any] = {
    "kind": "sequence_encoder",
    "width": 4,
    "encoder": {"kind": "real_number"},
    "layers": [
        {
            "backbone": {"kind": "ema", "bidirectional": False, "truncation": 3},
            "router": {"kind": "random", "rate": 0.5},
            "modules": {"all": GAU, "window": {**GAU, "window": 3}},
        }
    ],
}

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 1 << 31, 1 << 62, 1 << 64, 10**30, 10**4000, 0.5, 1e300, float("nan"), float("inf"),
    "", "F32", "C64", "F8_E4M3", "I8", "x" * 10_000, "/etc/passwd", "kind", "é\ud800",
    [], {}, [0], [0, 8], [[[[]]]], {"kind": "gau"}, {"a": {"a": {"a": {}}}}, [1 << 40] * 60, list(range(3000)),
)  # fmt: skip


def _saved() -> tuple[bytes, bytes, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = sma.save(sma.build(SPEC, seed=0), folder) / "model.safetensors"
        stream = sma.build(STREAM, seed=0).eval()
        state = stream(stream.encoder.random_inputs(2, 5), state=stream.init_state(2)).state  # type: ignore[operator]
        sma.save_state(state, Path(folder) / "state")
        return model.read_bytes(), (Path(folder) / "state").read_bytes(), stream


MODEL_FILE, STATE_FILE, STREAMING = _saved()


def _damaged(rng: random.Random, content: bytes) -> bytes:
    """A file with changed bytes, a changed header, a changed spec, or several of these."""
    way = rng.randrange(5)
    if way == 0:
        return mutate(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if way == 1:  # text of the header
        text = mutate(rng, content[8 : 8 + length])
        if rng.random() < 0.2:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice((b"[", b'{"a":', b"9", b" ", b'"')) * 100_000 + text[at:]
    elif way == 2 and "spec" in header["__metadata__"]:
        spec = json.loads(header["__metadata__"]["spec"])
        for _ in range(rng.randint(1, 3)):
            spec = _changed(rng, spec)
        text = _text(header | {"__metadata__": {"spec": _text(spec).decode()}})
    elif way == 3 and "spec" in header["__metadata__"]:
        spec = mutate(rng, header["__metadata__"]["spec"].encode()).decode("utf-8", "replace")
        text = _text(header | {"__metadata__": {"spec": spec}})
    else:
        for _ in range(rng.randint(1, 3)):
            header = _changed(rng, header)
        text = _text(header)
    if rng.random() < 0.2:
        data = mutate(rng, data)
    return struct.pack("<Q", len(text)) + text + data


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(rng: random.Random, value: Any) -> Any:
    """JSON with one part replaced, removed, added, renamed, exchanged or nested very deep."""
    if rng.random() < 0.8 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return value | {key: _changed(rng, value[key])}
    if rng.random() < 0.7 and isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    way = rng.randrange(6)
    if way == 0 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {name: part for name, part in value.items() if name != key}
    if way == 1 and isinstance(value, dict):
        return value | {str(rng.choice(JUNK))[:99] if rng.random() < 0.9 else "x" * 9999: rng.choice(JUNK)}
    if way == 2 and isinstance(value, dict) and len(value) > 1:
        one, other = rng.sample(list(value), 2)
        return value | {one: value[other], other: value[one]}
    if way == 3 and isinstance(value, int) and not isinstance(value, bool):
        return value * rng.choice((-1, 0, 2, 1000, 10**9)) + rng.choice((-1, 0, 1))
    if way == 4 and isinstance(value, list | dict):
        deep: Any = value
        for _ in range(rng.choice((3, 100, 250))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(JUNK)


def _model(rng: random.Random, folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(_damaged(rng, MODEL_FILE))
    return folder


def _load(folder: Path) -> SequenceModel:
    """Load a model, save it and load it again: a model that is accepted must be complete."""
    model = sma.load(folder)
    sma.save(model, folder)
    assert dump_spec(sma.load(folder).spec) == dump_spec(model.spec)
    return model


def _state(rng: random.Random, folder: Path) -> Path:
    content = _damaged(rng, STATE_FILE)
    if rng.random() < 0.3:  # counts and positions, which determine how much of the state is read
        at = STATE_FILE.index(b"}}") + 2 + 8 * rng.randrange(10)
        content = (
            STATE_FILE[:at]
            + struct.pack("<q", rng.choice((-(1 << 63), -1, 1, 9, 10**6, 1 << 40, 1 << 62)))
            + STATE_FILE[at + 8 :]
        )
    (folder / "state").write_bytes(content)
    return folder / "state"


@torch.no_grad()
def _continue(path: Path) -> None:
    """Load a state and continue the stream: a state that is accepted must be usable."""
    state = sma.load_state(path, STREAMING.init_state(1))
    STREAMING(STREAMING.encoder.random_inputs(state.batch_size, 3), state=state)


MODELS = Target(_model, _load)
STATES = Target(_state, _continue)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "cases"), [("MODELS", 500), ("STATES", 1000)])
def test_damaged_files_are_read_or_refused(target: str, cases: int) -> None:
    counts = fuzz(f"{__name__}:{target}", cases)
    print(target, counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
