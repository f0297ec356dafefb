import pickle

import numpy as np
import torch

from sma.tune.sharing import pack_data, unpack_data


def test_unpacked_data_is_equal_and_shares_memory() -> None:
    numbers = torch.arange(100_000)
    made = {
        "numbers": numbers,
        "again": numbers,
        "odd": torch.arange(12).view(3, 4).t(),
        "array": np.arange(7),
        "show": lambda value: value + 1,
    }
    packed = pack_data(made)
    found = unpack_data(packed)
    assert torch.equal(found["numbers"], numbers)
    assert torch.equal(found["odd"], made["odd"])
    assert found["array"].tolist() == list(range(7))
    assert found["show"](1) == 2
    assert found["again"].data_ptr() == found["numbers"].data_ptr() == packed.arrays[0].ctypes.data
    assert len(packed.head) < 10_000
    assert packed.num_bytes >= numbers.nbytes


def test_tensors_without_an_array_are_pickled() -> None:
    made = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, requires_grad=True), torch.eye(2).to_sparse()]
    packed = pack_data(made)
    found = unpack_data(packed)
    assert 3 not in [array.size for array in packed.arrays]
    assert torch.equal(found[0], made[0])
    assert found[1].requires_grad
    assert torch.equal(found[2].to_dense(), torch.eye(2))


def test_read_only_memory_is_unpacked() -> None:
    packed = pack_data(torch.arange(4.0))
    packed.arrays[0].flags.writeable = False
    assert unpack_data(packed).sum() == 6.0
    assert pickle.loads(pickle.dumps(packed)).num_bytes == packed.num_bytes
