"""What this machine has to offer a run: cores, GPUs, free ports. Found without torch, which takes seconds to load."""

import os
import random
import re
import socket
import subprocess
from pathlib import Path

SERVER_PORTS = range(20_000, 32_000)  # below Linux's ephemeral range: no outgoing connection takes one


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on, for a server that needs seconds until it binds it."""
    while True:
        port = random.choice(SERVER_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_count() -> int:
    """The NVIDIA GPUs that the driver shows here; 0 without a driver."""
    if (uuids := _listed()) is not None:
        return len(uuids)
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])


def gpu_uuids() -> list[str]:
    """The UUIDs of those GPUs, in nvidia-smi's order; none without nvidia-smi."""
    return _listed() or []


def _listed() -> list[str] | None:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    # The MIG instances of a GPU stand indented below it.
    return re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listing.stdout, re.MULTILINE)
