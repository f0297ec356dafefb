"""Environment variables of schedulers, launchers and libraries do not change a run."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torchmetrics
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torchmetrics.utilities.prints import rank_zero_only as prints

from sma.recipes.io.isolation import RANKS, hidden_variables, is_hidden
from sma.recipes.training.distributed import DistributedContext
from sma.recipes.training.run import run_experiment
from sma.recipes.training.trainer import isolated
from tests.test_recipes.tiny import EXPERIMENT, assert_same_run, checkpoint, metrics_of, same, tiny, train

pytestmark = pytest.mark.slow  # processes in every environment

ROOT = Path(__file__).resolve().parents[3]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "t",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "1",
}
PEERS = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}  # an address where nothing answers

ENVIRONMENTS = {
    "slurm": SLURM,
    "slurm-second-task": {
        **SLURM,
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    },
    "slurm-tasks-without-their-number-per-node": {**SLURM, "SLURM_NTASKS": "4"},
    "slurm-nodes": {
        **SLURM,
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "node[1-2]",
    },
    "slurm-interactive": {**SLURM, "SLURM_JOB_NAME": "bash"},
    "slurm-array": {**SLURM, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"},
    "slurm-without-numbers": {**SLURM, "SLURM_NTASKS": "many", "SLURM_PROCID": "first"},
    "torchrun": {
        **PEERS,
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
    },
    "torchrun-under-slurm": {
        **SLURM,
        **PEERS,
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
    },
    "kubeflow": {**PEERS, "KUBERNETES_PORT": "tcp://192.0.2.1:443", "RANK": "1", "WORLD_SIZE": "2"},
    "by-hand": {**PEERS, "LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"},
    "no-numbers": {
        "RANK": "",
        "LOCAL_RANK": "x",
        "NODE_RANK": "x",
        "WORLD_SIZE": "x",
        "MASTER_PORT": "x",
        "STANDALONE_PORT": "x",
    },
    "lsf": {
        "LSB_JOBID": "7",
        "LSB_DJOB_RANKFILE": "/nowhere",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
        "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_RANK": "3",
    },
    "mpi": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "PMI_SIZE": "2"},
    "xla": {"PJRT_DEVICE": "TPU", "XLA_USE_BF16": "1", "TPU_NAME": "x"},
    "trainer-stops": {
        "PL_TRAINER_FAST_DEV_RUN": "1",
        "PL_TRAINER_LIMIT_TRAIN_BATCHES": "1",
        "PL_TRAINER_MIN_EPOCHS": "3",
    },
    "trainer-changes": {
        "PL_TRAINER_ACCUMULATE_GRAD_BATCHES": "2",
        "PL_TRAINER_OVERFIT_BATCHES": "1",
        "PL_TRAINER_DETERMINISTIC": "True",
    },
    "trainer-nodes": {"PL_TRAINER_NUM_NODES": "2", "PL_TRAINER_SYNC_BATCHNORM": "1", "PL_TRAINER_PROFILER": "simple"},
    "seeds": {"PL_GLOBAL_SEED": "7", "PL_SEED_WORKERS": "1", "PYTHONHASHSEED": "7"},
    "fabric": {
        "LT_CLI_USED": "1",
        "LT_DEVICES": "2",
        "LT_ACCELERATOR": "cuda",
        "LT_STRATEGY": "ddp",
        "LT_PRECISION": "64-true",
        "LT_NUM_NODES": "2",
    },
    "debug": {
        "PL_DEV_DEBUG": "1",
        "PL_RUN_STANDALONE_TESTS": "1",
        "PL_USE_MOCKED_MNIST": "1",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
    },
    "checkpoints-that-run-code": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    "bars": {"TQDM_MINITERS": "often", "COLAB_GPU": "1"},
}

# Other variables that Lightning and torchmetrics read, and why they are harmless.
HARMLESS = {
    "FREEZE_REQUIREMENTS": "for developers of Lightning",
    "OMP_NUM_THREADS": "threads are for the user to choose; only launchers set it",
    "POSSIBLE_USER_WARNINGS": "which warnings are shown",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "set by Lightning itself",
    "USE_LIBUV": "set by Lightning itself, on Windows",
    "CUBLAS_WORKSPACE_CONFIG": "set by Lightning, for deterministic=True, which runs do not use",
    "CUDA_DEVICE_ORDER": "set by Lightning itself",
    "CUDA_VISIBLE_DEVICES": "the GPUs are for the user to choose",
    "DISABLE_MPS": "the device is for the user to choose",
    "DOCTEST_DOWNLOAD_TIMEOUT": "tests of torchmetrics",
    "SKIP_SLOW_DOCTEST": "tests of torchmetrics",
    **dict.fromkeys(("XLA_USE_F16", "XLA_USE_BF16", "PT_XLA_DEBUG"), "set by plug-ins that runs do not use"),
    **dict.fromkeys(("BITSANDBYTES_NOWELCOME", "DEEPSPEED_ENV_VAR"), "plug-ins that runs do not use"),
    **dict.fromkeys(
        ("COMET_API_KEY", "COMET_WORKSPACE", "COMET_EXPERIMENT_KEY", "COMET_DISABLE_AUTO_LOGGING"), "a logger not used"
    ),
    **dict.fromkeys(("WANDB_PROJECT", "WANDB_MODE", "MLFLOW_TRACKING_URI"), "loggers that runs do not use"),
}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A short run without any of these variables."""
    out = tmp_path_factory.mktemp("isolation") / "run"
    train(tiny(training__updates=12), out, data)
    return out


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_run_is_the_same_in_every_environment(reference, data, tmp_path, monkeypatch, capfd, name):
    for variable, value in ENVIRONMENTS[name].items():
        monkeypatch.setenv(variable, value)
    before = dict(os.environ)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"what Lightning would go on from")
    done = run_experiment(tiny(training__updates=12), tmp_path, data, accelerator="cpu", progress=name == "bars")
    assert dict(os.environ) == before
    assert same(checkpoint(tmp_path)["state_dict"], checkpoint(reference)["state_dict"])
    assert metrics_of(tmp_path) == metrics_of(reference)
    assert done.summary["test_accuracy"] == json.loads((reference / "summary.json").read_text())["test_accuracy"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("module", [lightning, torchmetrics], ids=["lightning", "torchmetrics"])
def test_every_variable_that_is_read_is_hidden_or_harmless(module):
    folder = Path(inspect.getfile(module)).parent
    sources = [path for path in folder.rglob("*.py") if path.parts[len(folder.parts)] != "app"]
    # Examples in docstrings match too; an extra variable does no harm.
    word = r"""["'](\w+)["']"""
    reads = re.compile(
        rf"(?:environ\.get|getenv|environ\.setdefault)\(\s*{word}|environ\[{word}\]|{word} (?:not )?in os\.environ"
    )
    found = {
        name for path in sources for match in reads.findall(path.read_text(encoding="utf-8")) for name in match if name
    }
    assert len(found) > 1
    assert sorted(name for name in found if not is_hidden(name) and name not in HARMLESS) == []


def test_backend_of_a_notebook_does_not_reach_a_command_that_it_starts():
    # torchmetrics imports matplotlib, which raises for an unknown backend.
    body = "sys.exit(exit_code(lambda: __import__('torchmetrics')))"
    command = f"import sys; from sma.recipes.io.command import exit_code; {body}"
    environment = {**os.environ, "MPLBACKEND": "backend_of_a_notebook"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_hidden_variables_are_restored_and_new_ones_removed(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("PATH_OF_MINE", "here")
    before = dict(os.environ)
    with hidden_variables():
        assert not {"SLURM_JOB_ID", "RANK"} & {*os.environ}
        assert os.environ["PATH_OF_MINE"] == "here"
        os.environ["PL_GLOBAL_SEED"] = os.environ["SLURM_JOB_ID"] = "3"
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", RANKS)
def test_distributed_training_keeps_the_rank_variables(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with hidden_variables(ranks=False):
        assert os.environ[name] == "1"
        assert "SLURM_PROCID" not in os.environ


def test_rank_comes_from_the_distributed_context_and_not_from_the_environment():
    before = rank_zero_only.rank, prints.rank
    rank_zero_only.rank = prints.rank = 3
    try:
        with isolated():
            assert (rank_zero_only.rank, prints.rank) == (0, 0)
        with isolated(DistributedContext(1, 2)):
            assert (rank_zero_only.rank, prints.rank) == (1, 1)
        assert (rank_zero_only.rank, prints.rank) == (3, 3)
    finally:
        rank_zero_only.rank, prints.rank = before


@pytest.mark.parametrize(
    "name", ["slurm-tasks-without-their-number-per-node", "torchrun-under-slurm", "no-numbers", "slurm-without-numbers"]
)
def test_command_gives_the_same_run_in_every_environment(data, tmp_path, name):
    # Lightning reads the environment at import, too.
    experiment = {**EXPERIMENT, "training": {**EXPERIMENT["training"], "updates": 12}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sma.recipes.seqboat_lra",
        "--spec",
        str(tmp_path / "spec.yaml"),
        "--data",
        str(tmp_path),
        "--no-progress",
    ]
    train(tiny(training__updates=12), tmp_path / "whole", tiny().task.prepare(tmp_path, progress=False))
    environment = {**os.environ, **ENVIRONMENTS[name]}
    done = subprocess.run(
        [*command, "--accelerator", "cpu", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
