"""Where a run's processes start: `GpuInfrastructure`, a Prefect block with a form in the UI, and the blocks shipped.

Prefect itself knows neither GPUs nor launchers. The block says how many processes a step gets on which devices;
`launch()` turns that into what `infra.launch.run` takes.
"""

import math
import os
from typing import Literal, Self

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.types import SecretDict
from pydantic import Field, model_validator

from infra.launchers import Launch, Launcher
from infra.machine import cores, gpu_count
from infra.shipped import SHIPPED, unknown_name


class GpuInfrastructure(Block):
    """The launcher, devices, environment and limits of the processes that train and evaluate."""

    _block_type_name = "GPU Infrastructure"
    _block_type_slug = "gpu-infrastructure"
    _description = "Where and with which launcher, GPUs and environment rlhf-flows starts its training processes."

    launcher: Launcher = Field(
        default="torchrun",
        description="What starts the processes of a step: torchrun or deepspeed on this machine, or slurm (srun).",
    )
    nodes: int = Field(default=1, ge=1, description="Machines per step; more than one with slurm or hosts.")
    hosts: list[str] = Field(
        default_factory=list,
        description="With torchrun and several nodes: their addresses, which all of them reach. The project and the "
        "workspace lie at the same paths on all; GPUs of other machines are not leased.",
    )
    remote_shell: str = Field(
        default="ssh -o BatchMode=yes", description="What runs a command line on a host, without asking for a password."
    )
    device: Literal["cpu", "cuda"] = Field(default="cuda", description="What the processes compute on.")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs per machine, with one process each; 0 on a CPU.")
    processes_per_node: int | None = Field(
        default=None, ge=1, description="Processes per machine on a CPU. Leave it empty with GPUs."
    )
    gpu_indices: list[int] | None = Field(
        default=None, description="Which GPUs, by nvidia-smi's numbers. Empty: whichever are free."
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables that anyone may read.")
    secret_env: SecretDict = Field(
        default=SecretDict({}), description="Environment variables that are masked in the UI and in logs."
    )
    slurm_options: list[str] = Field(
        default_factory=list, description="Further options of srun, such as --partition=gpu or --account=lab."
    )
    work_pool: str | None = Field(
        default=None, description="The work pool of deployments that use this block, unless they name another."
    )
    grace_seconds: float = Field(
        default=20.0, ge=0, le=25, description="Time for a checkpoint when a run is stopped. Prefect kills after 30 s."
    )
    stall_minutes: float | None = Field(
        default=30.0,
        gt=0,
        description="A step that says nothing for so long leaves its stacks in the log, is stopped and goes on from "
        "its checkpoint. Empty: never.",
    )
    threads_per_process: int | None = Field(
        default=None, ge=1, description="CPU threads per process. Empty: the cores shared out evenly."
    )

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "deepspeed" and self.nodes > 1:
            raise ValueError("launcher deepspeed starts the processes of one machine: use torchrun or slurm.")
        if self.launcher == "torchrun" and len(self.hosts) != (self.nodes if self.nodes > 1 else 0):
            raise ValueError(
                f"nodes is {self.nodes} and hosts names {len(self.hosts)}: torchrun on several machines needs the "
                "address of each; leave hosts empty for one."
            )
        if self.launcher != "torchrun" and self.hosts:
            raise ValueError("hosts are named but the launcher is not torchrun: choose it, or remove them.")
        if self.launcher != "slurm" and self.slurm_options:
            raise ValueError("slurm_options are set but the launcher is not slurm: choose it, or remove them.")
        if self.launcher == "slurm" and self.gpu_indices is not None:
            raise ValueError("Slurm itself chooses the GPUs: leave gpu_indices empty.")
        return self

    @model_validator(mode="after")
    def _devices_fit(self) -> Self:
        if self.device == "cpu":
            if self.gpus_per_node or self.gpu_indices is not None:
                raise ValueError("device is cpu but GPUs are named: set device to cuda, or leave the GPU fields empty.")
            return self
        if self.gpus_per_node == 0:
            raise ValueError("device is cuda with no GPU: set gpus_per_node to 1 or more, or device to cpu.")
        if self.processes_per_node not in (None, self.gpus_per_node):
            raise ValueError("on cuda each GPU has one process: leave processes_per_node empty.")
        if self.gpu_indices is not None and len(set(self.gpu_indices)) != self.gpus_per_node:
            raise ValueError(
                f"gpu_indices names {len(set(self.gpu_indices))} GPUs and gpus_per_node asks for {self.gpus_per_node}: "
                "make them the same."
            )
        return self

    @property
    def processes(self) -> int:
        """Processes per machine: one per GPU, or as many as the block asks for on a CPU."""
        return self.gpus_per_node or self.processes_per_node or 1

    def launch(self) -> Launch:
        """What `infra.launch.run` takes; ValueError if this machine hasn't the GPUs."""
        threads = self.threads_per_process or max(1, cores() // self.processes)
        return Launch(
            launcher=self.launcher,
            nodes=self.nodes,
            processes=self.processes,
            gpus=self._gpus() if self.device == "cuda" and self.launcher != "slurm" and not self.hosts else (),
            env={"OMP_NUM_THREADS": str(threads), **self._device_env(), **self.env, **self._secrets()},
            options=tuple(self.slurm_options),
            hosts=tuple(self.hosts),
            remote_shell=self.remote_shell,
            grace_seconds=self.grace_seconds,
            stall_seconds=60 * self.stall_minutes if self.stall_minutes else math.inf,
        )

    def _device_env(self) -> dict[str, str]:
        if self.device == "cpu":
            return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # Without the order CUDA counts the fastest GPU as 0, and nvidia-smi the one in the first slot.
        return {"DS_ACCELERATOR": "cuda", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def _gpus(self) -> tuple[str, ...]:
        """The GPUs that a step may lease."""
        allowed = allowed_gpus()
        chosen = allowed if self.gpu_indices is None else [str(i) for i in self.gpu_indices if str(i) in allowed]
        if len(chosen) < self.gpus_per_node:
            wanted = f"GPU {self.gpu_indices}" if self.gpu_indices else f"{self.gpus_per_node} GPU(s)"
            found = f"only GPU {', '.join(allowed)}" if allowed else "none"
            raise ValueError(
                f"the infrastructure asks for {wanted} and this machine shows {found}: choose another one "
                "(infrastructure: local-cpu needs no GPU), or check `nvidia-smi -L` and CUDA_VISIBLE_DEVICES."
            )
        return tuple(chosen)

    def _secrets(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.secret_env.get_secret_value().items()}


def allowed_gpus() -> list[str]:
    """The GPUs that this process may hand out, as CUDA_VISIBLE_DEVICES names them."""
    present = gpu_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present == 0 or visible is None:
        return [str(index) for index in range(present)]
    return [name for name in visible.replace(" ", "").split(",") if name]


def resolve(name: str) -> GpuInfrastructure:
    """The infrastructure of that name: the block saved in Prefect, else the one that the repo ships.

    ValueError with the nearest name if there is neither. Without a configured Prefect API no server is asked.
    """
    if PREFECT_API_URL.value() is not None:
        saved = _load(name)
        if saved is not None:
            return saved
    if name not in SHIPPED:
        raise ValueError(unknown_name(name, SHIPPED))
    return GpuInfrastructure(**SHIPPED[name])


def _load(name: str) -> GpuInfrastructure | None:
    try:
        block = GpuInfrastructure.load(name)
    except ValueError as error:
        if "Unable to find block document" in str(error):
            return None
        raise
    assert isinstance(block, GpuInfrastructure)
    return block


def register() -> list[str]:
    """Saves the shipped blocks in Prefect, over earlier ones of the same names, and returns the names."""
    for name, fields in SHIPPED.items():
        GpuInfrastructure(**fields).save(name, overwrite=True)
    return list(SHIPPED)


def available() -> dict[str, tuple[GpuInfrastructure, bool]]:
    """Name -> block and whether it is saved in Prefect, of all that a run can name. Shipped ones need no server."""
    found = {name: (GpuInfrastructure(**fields), False) for name, fields in SHIPPED.items()}
    if PREFECT_API_URL.value() is not None:
        try:
            with get_client(sync_client=True) as client:
                documents = client.read_block_documents_by_type("gpu-infrastructure", include_secrets=False)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            documents = []  # nothing was ever saved, so Prefect does not know the type
        for name in sorted(document.name for document in documents if document.name):
            if (saved := _load(name)) is not None:
                found[name] = (saved, True)
    return found
