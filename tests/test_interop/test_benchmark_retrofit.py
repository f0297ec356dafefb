"""Benchmark of retrofitted models: its counts of MACs, and the resumption of an interrupted run."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import retrofit
from tests.test_interop.libraries import transformers

SMALL = ["--width", "16", "--hidden", "24", "--layers", "2", "--heads", "2", "--context", "16", "--rows", "2"]
SHORT = [*SMALL, "--dense", "3", "--routers", "2", "--everything", "2"]


def test_macs_equal_the_counted_matrix_products():
    plan = retrofit.Plan(width=16, hidden=24, layers=2, heads=2, context=32)
    model = retrofit.llama(plan)
    assert isinstance(model, transformers.LlamaForCausalLM)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, plan.context, dtype=torch.long))
    # The counter counts two operations per MAC and omits the fused attention: scores and sums for half of the pairs.
    pairs = 2 * plan.layers * plan.width * (plan.context + 1) / 2
    assert retrofit.macs_per_byte(plan, None) - pairs == counter.get_total_flops() / 2 / plan.context
    half = retrofit.macs_per_byte(plan, [0.5, 0.5])
    mlp, router = 3 * plan.width * plan.hidden, 2 * plan.width
    assert half == retrofit.macs_per_byte(plan, None) - mlp + 2 * router


def test_a_run_measures_every_point_once_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retrofit", "--json", "--seeds", "3", "--out", str(tmp_path), *SHORT])
    retrofit.main()
    points = json.loads(capsys.readouterr().out)
    keys = [(point["variant"], point["rate"], point["trained"]) for point in points]
    assert keys == [
        (variant, rate, trained)
        for variant, rates, phases in (
            ("dense", (1.0,), ("nothing", "everything")),
            ("routed", retrofit.RATES, ("routers", "everything")),
            ("random", retrofit.RATES, ("nothing", "everything")),
        )
        for rate in rates
        for trained in phases
    ]
    kept = (tmp_path / "points.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "points.jsonl").write_text("\n".join(kept[:-1]) + "\n", encoding="utf-8")
    retrofit.main()
    assert json.loads(capsys.readouterr().out) == points
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dense", "4"])
    with pytest.raises(SystemExit, match="holds points of other settings"):
        retrofit.main()
