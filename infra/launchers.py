"""The command lines and the environment of the launchers: torchrun, DeepSpeed's, Slurm's, and none for one process.

`infra.launch` runs what stands here. Every rank is `python -m infra.rank MODULE ...`, whatever started it.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra.hosts import FORWARD
from infra.machine import free_port

Launcher = Literal["torchrun", "deepspeed", "slurm"]
VISIBLE = "RLHF_VISIBLE_GPUS"
"""Environment variable with the GPUs of a step: DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES, ranks mend it."""


@dataclass(frozen=True)
class Launch:
    """How a step is started; `GpuInfrastructure.launch()` makes one from a block."""

    launcher: Launcher = "torchrun"
    nodes: int = 1
    processes: int = 1
    """Per node."""
    gpus: tuple[str, ...] = ()
    """GPUs of this machine that may be leased, one per process; none on a CPU and where Slurm hands them out."""
    env: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Of srun, such as --partition=gpu."""
    hosts: tuple[str, ...] = ()
    """The machines of torchrun, if there are several: addresses that all of them reach, the first one's first."""
    remote_shell: str = "ssh -o BatchMode=yes"
    """What runs a command line on a host: it is given the host and the line."""
    grace_seconds: float = 20.0
    """Prefect's worker kills the flow 30 s after it asked it to end."""

    stall_seconds: float = math.inf
    """A step that says nothing for so long is stopped."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def leases(self) -> int:
        """The GPUs that a step takes."""
        return self.processes if self.gpus else 0


def command(launch: Launch, module: str, arguments: Sequence[str], *, hostfile: Path) -> list[str]:
    """The command line that starts `python -m MODULE ARGUMENTS` once per process.

    Args:
        hostfile: written for DeepSpeed's launcher, which reads from it how many processes this machine takes.
    """
    rank = ["infra.rank", module, *arguments]
    if launch.launcher == "slurm":
        return [sys.executable, "-m", "infra.slurm", *_srun(launch), sys.executable, "-m", *rank]
    if launch.hosts:
        return [
            *[sys.executable, "-m", "infra.hosts", "--shell", launch.remote_shell, "--hosts", ",".join(launch.hosts)],
            *["--", sys.executable, "-m", "torch.distributed.run", f"--nnodes={launch.nodes}", "--node_rank={node}"],
            *[f"--nproc_per_node={launch.processes}", f"--master_addr={launch.hosts[0]}"],
            *[f"--master_port={free_port()}", "-m", *rank],
        ]
    if launch.processes == 1:
        return [sys.executable, "-m", *rank]  # a launcher would only add the seconds that importing torch takes
    if launch.launcher == "deepspeed":
        hostfile.write_text(f"localhost slots={launch.processes}\n")
        return [
            *[sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--no_ssh", "--node_rank=0"],
            *["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--no_local_rank", "--module", *rank],
        ]
    return [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={launch.processes}"],
        "--local_addr=127.0.0.1",  # or the ranks look for this host's name, which a container may not resolve
        *["-m", *rank],
    ]


def _srun(launch: Launch) -> list[str]:
    gpus = [f"--gpus-per-node={launch.processes}"] if launch.env.get("DS_ACCELERATOR") == "cuda" else []
    return [
        *["srun", f"--nodes={launch.nodes}", f"--ntasks-per-node={launch.processes}", *gpus, *launch.options],
        # One rank that fails ends the others; the output comes line by line, as the flow reads messages in it.
        *["--kill-on-bad-exit=1", "--unbuffered", "--export=ALL", "--job-name=rlhf"],
    ]


def environment(launch: Launch, gpus: Sequence[str] = ()) -> dict[str, str]:
    """The variables that the processes of a step need on top of the flow's own environment; `gpus` are the leased."""
    shared = {"RLHF_GRACE_SECONDS": str(launch.grace_seconds), **launch.env}
    if gpus:
        shared |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if launch.launcher == "slurm":
        return {"MASTER_PORT": str(free_port()), **shared}
    if "CUDA_VISIBLE_DEVICES" in shared:
        shared[VISIBLE] = shared["CUDA_VISIBLE_DEVICES"]
    if launch.hosts:
        shared[FORWARD] = ",".join(shared)
    if launch.world_size > 1:
        # torchrun kills its ranks this long after SIGTERM: the supervisor shall be the one that decides.
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(launch.grace_seconds) + 5), **shared}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **shared}
