"""Files of tensors are compatible with the library safetensors in both directions; damaged files raise errors."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sma.errors import CheckpointError
from sma.tensor_file import _CODES, HEADER, open_tensors, write_tensors

TENSORS = {f"of {code}": torch.arange(6).reshape(3, 2).to(dtype) for code, dtype in _CODES.items()} | {
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(3.5),
    'a "name"\n of ä': torch.ones(2, dtype=torch.float64),
}
METADATA = {"b": "é", "a": "x"}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bytes(_raw(one)) == bytes(_raw(other))


def _raw(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def test_safetensors_reads_our_files(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(_same(found[name], tensor) for name, tensor in TENSORS.items())


def test_files_of_safetensors_can_be_read(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata=METADATA)
    with open_tensors(tmp_path / "file") as file:
        assert file.metadata == METADATA
        assert file.entries.keys() == TENSORS.keys()
        assert all(_same(file.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T,
        torch.randn(2).expand(5, 2),
        torch.randn(9)[::2],
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.ones(2).real,
    ],
    ids=["transposed", "expanded", "strided", "conjugate", "view"],
)
def test_tensors_of_any_layout_are_written_by_value(tmp_path, tensor):
    write_tensors(tmp_path / "file", {"it": tensor}, {})
    assert torch.equal(load_file(tmp_path / "file")["it"], tensor)


def test_bytes_depend_on_the_content_only(tmp_path):
    write_tensors(tmp_path / "one", TENSORS, METADATA)
    write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_tensor_is_aligned(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {})
    with open_tensors(tmp_path / "file") as file:
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_a_tensor_is_read_into_separate_writable_memory(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {})
    with open_tensors(tmp_path / "file") as file:
        tensor = file.read("of F32")
    (tmp_path / "file").write_bytes(b"")
    assert tensor.add_(1)[0, 0] == 1


def test_a_file_that_is_replaced_while_open_gives_the_old_content(tmp_path):
    write_tensors(tmp_path / "file", {"it": torch.ones(99999)}, {"which": "old"})
    write_tensors(tmp_path / "new", {"it": torch.zeros(2)}, {"which": "new"})
    with open_tensors(tmp_path / "file") as file:
        (tmp_path / "new").replace(tmp_path / "file")
        assert file.metadata == {"which": "old"}
        assert torch.equal(file.read("it"), torch.ones(99999))


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"'it' has the dtype torch\.complex128, which safetensors does not support; convert it"
    ):
        write_tensors(tmp_path / "file", {"it": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_truncated_during_reading_is_refused(tmp_path):
    write_tensors(tmp_path / "file", {"it": torch.zeros(99999)}, {})
    with open_tensors(tmp_path / "file") as file:
        (tmp_path / "file").open("rb+").truncate(5000)
        with pytest.raises(CheckpointError, match="was truncated while it was read; save it again"):
            file.read("it")


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"", "of its 0 bytes, 0 would be its header", id="empty"),
        pytest.param(
            _file({}, length=1 << 62), "of its 10 bytes, 4,611,686,018,427,387,904 would be its header", id="length"
        ),
        pytest.param(
            _file({}, b" " * (HEADER + 9), HEADER + 1),
            "would be its header, which has at most 33,554,432",
            id="long header",
        ),
        pytest.param(_file(b'{"a'), "its header is not JSON", id="half a header"),
        pytest.param(_file(b"\xff\xfe{}"), "its header is not JSON", id="no UTF-8"),
        pytest.param(_file(b"[" * 99999), "its header is not JSON", id="deep header"),
        pytest.param(_file(b'{"__metadata__":{"a":' + b'{"a":' * 99999), "its header is not JSON", id="deep metadata"),
        pytest.param(_file(b'{"a": ' + b"9" * 5000 + b"}"), "its header is not JSON|it describes", id="long number"),
        pytest.param(_file([]), "its header is \\[\\], not a mapping", id="list"),
        pytest.param(
            _file({"__metadata__": []}), "its metadata is \\[\\], not a mapping of strings", id="metadata of a list"
        ),
        pytest.param(
            _file({"__metadata__": {"spec": 3}}),
            "its metadata is {'spec': 3}, not a mapping of strings",
            id="metadata of a number",
        ),
        pytest.param(_file({"a": 3}), "it describes 'a' by 3", id="no description"),
        pytest.param(_file({"a": {"dtype": "F32"}}), "it describes 'a' by {'dtype': 'F32'}", id="half a description"),
        pytest.param(
            _file({"a": _entry(dtype="F4")}, bytes(8)), "'a' has the dtype 'F4', which is not known", id="dtype"
        ),
        pytest.param(
            _file({"a": _entry(dtype=[])}, bytes(8)), "'a' has the dtype \\[\\], which is not known", id="no dtype"
        ),
        pytest.param(_file({"a": _entry(shape=2)}, bytes(8)), "it describes 'a' by", id="shape of a number"),
        pytest.param(_file({"a": _entry(shape=[True, 2])}, bytes(8)), "it describes 'a' by", id="shape of truth"),
        pytest.param(_file({"a": _entry(shape=[-1, -2])}, bytes(8)), "it describes 'a' by", id="negative shape"),
        pytest.param(_file({"a": _entry(shape=[2.0])}, bytes(8)), "it describes 'a' by", id="fractions"),
        pytest.param(_file({"a": _entry(shape=[1] * 99)}, bytes(8)), "it describes 'a' by", id="99 axes"),
        pytest.param(_file({"a": _entry(shape=[1 << 64])}, bytes(8)), "it describes 'a' by", id="shape of no integer"),
        pytest.param(
            _file({"a": _entry(shape=[1 << 40] * 60)}, bytes(8)),
            "'a', float32 of .*, is at bytes",
            id="enormous shape",
        ),
        pytest.param(
            _file({"a": _entry(data_offsets=[0, 4])}, bytes(8)),
            "'a', float32 of shape \\(2,\\), is at bytes",
            id="offsets",
        ),
        pytest.param(_file({"a": _entry(data_offsets=[4, 12])}, bytes(12)), "is at bytes", id="gap"),
        pytest.param(_file({"a": _entry(), "b": _entry()}, bytes(8)), "is at bytes", id="overlap"),
        pytest.param(_file({"a": _entry(data_offsets=[8, 0])}, bytes(8)), "is at bytes", id="backwards"),
        pytest.param(_file({"a": _entry()}, bytes(9)), "and its tensors end at", id="more bytes"),
        pytest.param(_file({"a": _entry()}, bytes(7)), "and its tensors end at", id="fewer bytes"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught, open_tensors(tmp_path / "file"):
        pass
    assert str(tmp_path / "file") in str(caught.value)
    assert len(str(caught.value)) < 1000
