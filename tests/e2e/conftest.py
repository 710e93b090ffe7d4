import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from infra.owned import processes_with

MARK = "RLHF_E2E"  # environment variable that every process below a command of a test inherits
CPU = {"precision": "fp32"}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"demo": {"pairs": 400}, "max_prompt_tokens": 128, "max_answer_tokens": 128},
    "models": {"policy": {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": 400, "positions": 256}},
    "sft": {"max_steps": 4, "batch_size": 8, "eval_rows": 16, "engine": CPU},
    "reward": {"max_steps": 4, "batch_size": 8, "eval_rows": 16, "engine": CPU},
    "ppo": {
        "steps": 3,
        "rollout_batch_size": 8,
        "batch_size": 8,
        "checkpoint_every": 1,
        **{f"{model}_engine": CPU for model in ("policy", "critic", "reference", "reward")},
    },
    "evaluate": {"prompts": 16, "batch_size": 16, "precision": "fp32"},
    "promote": {"gates": {"win_rate_vs_champion": ">= 0"}},
}
"""A run of a few steps: every stage is real, and none is any good."""


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    output: str
    seconds: float
    left: list[int]
    """The processes that it left behind."""


class Command:
    """`rlhf` as a user calls it, in a process of its own."""

    def __init__(self, arguments: list[str], env: dict[str, str], output: int | IO[str] = subprocess.PIPE) -> None:
        self.mark = uuid.uuid4().hex
        self.started = time.time()
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("rlhf"), *arguments],
            env={**os.environ, **env, MARK: self.mark},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, happened: Callable[[], Any], seconds: float = 120) -> Any:
        """What `happened` returns as soon as that is something, while the command runs."""
        end = time.monotonic() + seconds
        while not (found := happened()):
            assert self.process.poll() is None, self.end().output
            assert time.monotonic() < end, self._give_up()
            time.sleep(0.05)
        return found

    def end(self, seconds: float = 400) -> Ended:
        """Waits until the command ends by itself."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._give_up()) from None
        return Ended(self.process.returncode, output, time.time() - self.started, processes_with(MARK, self.mark))

    def _give_up(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return f"still running after {time.time() - self.started:.0f} s:\n{self.process.communicate(timeout=60)[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the config tiny.yaml and the workspace of the module's runs."""
    folder = tmp_path_factory.mktemp("e2e")
    tree = TINY | {"workspace": str(folder / "workspace")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def command() -> Callable[..., Command]:
    """(arguments, api=address, output=file) -> `rlhf` with these; without an address it starts a server of its own."""
    return lambda *arguments, api="", output=subprocess.PIPE: Command(list(arguments), {"PREFECT_API_URL": api}, output)


@pytest.fixture(scope="module")
def rlhf(folder: Path) -> Callable[..., Command]:
    """(command, options, api=address) -> the command on tiny.yaml; without an address it starts a server of its own."""

    def start(command: str, *options: str, api: str = "") -> Command:
        return Command([command, str(folder / "tiny.yaml"), *options], {"PREFECT_API_URL": api})

    return start
