"""`rlhf infra`: the infrastructure that a run can name, and who holds this machine's GPUs."""

from typing import TYPE_CHECKING

from flows.cli import console
from flows.cli.errors import Debug
from flows.cli.models import WORKSPACE, Workspace

if TYPE_CHECKING:
    from infra.gpu import GpuInfrastructure


def register(workspace: Workspace = WORKSPACE, debug: Debug = False) -> None:
    """Save the blocks that the repo ships in Prefect, where their fields can be changed in a form."""
    from flows import local

    with local.terminated_in_order(), local.PrefectServer(workspace / "logs", quiet=not debug) as server:
        from infra import gpu

        with server.connected():
            names = gpu.register()
    console.console.print(f"Saved as blocks of the type GPU Infrastructure: {', '.join(names)}.", soft_wrap=True)


def list_(workspace: Workspace = WORKSPACE, debug: Debug = False) -> None:
    """Show the infrastructure that a run can name, and this machine's GPUs."""
    from flows import local

    with local.terminated_in_order(), local.PrefectServer(workspace / "logs", quiet=not debug) as server:
        from infra import gpu
        from infra.leases import holders

        with server.connected():
            blocks = gpu.available()
        gpus = gpu.allowed_gpus()
        taken = holders(gpus) if gpus else {}
    lines = [_line(name, block, saved) for name, (block, saved) in blocks.items()]
    console.console.print(console.table(("name", "launcher", "per node", "nodes", "work pool", ""), lines))
    if not all(saved for _, saved in blocks.values()):
        console.console.print("\n[dim]`rlhf infra register` saves those that are only shipped in Prefect.[/]")
    console.console.print()
    for index in gpus:
        console.console.print(f"GPU {index}: {taken.get(index, 'free')}", soft_wrap=True)
    if not gpus:
        console.console.print("This machine shows no GPU.")


def _line(name: str, block: "GpuInfrastructure", saved: bool) -> tuple[str, ...]:
    unit = "GPU" if block.device == "cuda" else "CPU process"
    many = f"{block.processes} {unit}{'' if block.processes == 1 else 'es' if unit.endswith('s') else 's'}"
    which = f" ({', '.join(map(str, block.gpu_indices))})" if block.gpu_indices else ""
    state = "[green]saved[/]" if saved else "[dim]shipped[/]"
    return name, block.launcher, many + which, str(block.nodes), block.work_pool or "", state
