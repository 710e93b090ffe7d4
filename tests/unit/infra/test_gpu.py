"""The block's fields, what it hands to the launcher, and how a name becomes a block, all without a server."""

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types import SecretDict

from infra import gpu
from infra.gpu import GpuInfrastructure, resolve
from infra.shipped import SHIPPED


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@pytest.mark.parametrize(
    ("name", "processes"), [("local-cpu", 1), ("local-cpu-2", 2), ("one-gpu", 1), ("two-gpus", 2), ("one-node", 8)]
)
def test_shipped_names_need_no_server(monkeypatch: pytest.MonkeyPatch, name: str, processes: int) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: 8)
    assert resolve(name).launch().processes == processes


def test_every_shipped_block_is_valid() -> None:
    launchers = {name: GpuInfrastructure(**fields).launcher for name, fields in SHIPPED.items()}
    of_one_machine = dict.fromkeys(["local-cpu", "local-cpu-2", "one-gpu", "two-gpus", "one-node"], "torchrun")
    assert launchers == {**of_one_machine, "two-nodes": "slurm"}


@pytest.mark.parametrize(("name", "hint"), [("one-gpus", "did you mean 'one-gpu'"), ("xyz", "local-cpu, local-cpu-2")])
def test_an_unknown_name_is_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        resolve(name)


def test_cpu_processes_share_the_cores_and_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cores", lambda: 6)
    env = GpuInfrastructure(device="cpu", processes_per_node=2).launch().env
    assert env == {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def test_more_processes_than_cores_get_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cores", lambda: 2)
    assert GpuInfrastructure(device="cpu", processes_per_node=4).launch().env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("indices", "visible", "expected"),
    [(None, None, "0,1,2,3"), ([3, 1], None, "3,1"), (None, "2, 3", "2,3"), ([3, 2], "2,3", "3,2")],
)
def test_gpus_that_may_be_leased(
    monkeypatch: pytest.MonkeyPatch, indices: list[int] | None, visible: str | None, expected: str
) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launch = GpuInfrastructure(gpus_per_node=2, gpu_indices=indices).launch()
    assert launch.gpus == tuple(expected.split(","))
    assert launch.leases == 2


@pytest.mark.parametrize(
    ("present", "indices", "visible", "sentence"),
    [
        (0, None, None, "asks for 2 GPU.* shows none"),
        (1, None, None, "asks for 2 GPU.* only GPU 0"),
        (4, [0, 4], None, r"asks for GPU \[0, 4\].* only GPU 0, 1, 2, 3"),
        (4, [0, 1], "1,2", r"asks for GPU \[0, 1\].* only GPU 1, 2"),
        (4, None, "", "asks for 2 GPU.* shows none"),
    ],
)
def test_missing_gpus_are_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, present: int, indices: list[int] | None, visible: str | None, sentence: str
) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: present)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=sentence):
        GpuInfrastructure(gpus_per_node=2, gpu_indices=indices).launch()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"device": "cuda"}, "set gpus_per_node"),
        ({"device": "cpu", "gpus_per_node": 1}, "GPUs are named"),
        ({"gpus_per_node": 2, "processes_per_node": 4}, "each GPU has one process"),
        ({"gpus_per_node": 2, "gpu_indices": [1, 1]}, "names 1 GPUs"),
        ({"gpus_per_node": 1, "grace_seconds": 40}, "less than or equal to 25"),
        ({"gpus_per_node": 1, "nodes": 2}, "nodes is 2 and hosts names 0"),
        ({"gpus_per_node": 1, "nodes": 2, "launcher": "deepspeed"}, "one machine: use torchrun or slurm"),
        ({"gpus_per_node": 1, "hosts": ["a"]}, "leave hosts empty for one"),
        ({"gpus_per_node": 1, "nodes": 2, "launcher": "slurm", "hosts": ["a", "b"]}, "the launcher is not torchrun"),
        ({"gpus_per_node": 1, "slurm_options": ["-p", "gpu"]}, "launcher is not slurm"),
        ({"gpus_per_node": 1, "launcher": "slurm", "gpu_indices": [0]}, "Slurm itself chooses"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GpuInfrastructure.model_validate(fields)


def test_slurm_hands_out_the_gpus_itself() -> None:
    launch = GpuInfrastructure(launcher="slurm", nodes=2, gpus_per_node=4, slurm_options=["--partition=gpu"]).launch()
    assert (launch.world_size, launch.leases, launch.options) == (8, 0, ("--partition=gpu",))


def test_secrets_reach_the_processes_and_no_printed_block() -> None:
    block = GpuInfrastructure(device="cpu", env={"A": "1"}, secret_env=SecretDict({"HF_TOKEN": "hf_abc"}))
    assert block.launch().env["HF_TOKEN"] == "hf_abc"
    assert block.launch().env["A"] == "1"
    assert "hf_abc" not in repr(block) + str(block.model_dump())
    assert GpuInfrastructure.model_json_schema()["secret_fields"] == ["secret_env.*"]
