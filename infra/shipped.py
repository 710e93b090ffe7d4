"""The GPU infrastructure blocks that the repo ships, as data: fields of `infra.gpu.GpuInfrastructure` by name.

Apart from `infra.gpu`, so that a config can be checked for its infrastructure's name without loading Prefect.
"""

import difflib
from collections.abc import Iterable
from typing import Any

SHIPPED: dict[str, dict[str, Any]] = {
    "local-cpu": {"device": "cpu", "processes_per_node": 1},
    "local-cpu-2": {"device": "cpu", "processes_per_node": 2},
    "one-gpu": {"device": "cuda", "gpus_per_node": 1},
    "two-gpus": {"device": "cuda", "gpus_per_node": 2},
    "one-node": {"device": "cuda", "gpus_per_node": 8},
    "two-nodes": {"launcher": "slurm", "nodes": 2, "device": "cuda", "gpus_per_node": 8},
}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """The sentence for an infrastructure that there is not, with the nearest name that there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the repo ships {', '.join(known)}."
    return f"unknown infrastructure {name!r}: {hint}"
