import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def _group() -> Iterator[tuple[Any, dict[str, str]]]:
    """The device of a process group of one rank, which a process can have once, and the environment that it needs."""
    import torch.distributed as dist

    from tests.bench.process import start_alone

    before = dict(os.environ)
    device = start_alone("cpu")
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    os.environ.update(before)
    yield device, own
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(_group: tuple[Any, dict[str, str]]) -> Iterator[Any]:
    """The CPU, under DeepSpeed as the one rank of a group, while a module's tests run."""
    device, own = _group
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        yield device
