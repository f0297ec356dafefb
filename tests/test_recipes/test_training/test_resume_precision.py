"""A resumed run has bit-identical weights in every precision."""

from pathlib import Path

import pytest

from sma.recipes.io.run_folder import LAST
from tests.test_recipes.tiny import before_update, checkpoint, fail, same, tiny, train


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(precision: str, tmp_path: Path) -> None:
    spec = tiny(threads=1, precision=precision)
    data = spec.task.prepare(tmp_path / "data", progress=False)
    train(spec, tmp_path / "whole", data)
    with pytest.MonkeyPatch.context() as patch:
        before_update(patch, 15, fail)
        with pytest.raises(RuntimeError, match="the power went out"):
            train(spec, tmp_path / "parts", data)
    train(spec, tmp_path / "parts", data, resume=True)
    whole, parts = (checkpoint(tmp_path / folder, LAST) for folder in ("whole", "parts"))
    for part in ("state_dict", "optimizer_states"):
        assert same(parts[part], whole[part]), part
