"""Command lines, environment, exit codes, and what becomes of a step's output."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import launch
from infra.launch import overall_exit_code
from infra.launchers import Launch, command, environment

HOSTS = Path("/nowhere/worker.hosts")


def test_one_process_is_started_without_torchrun() -> None:
    assert command(Launch(), "tasks.worker", ["sft", "dir"], hostfile=HOSTS) == [
        *[sys.executable, "-m", "infra.rank", "tasks.worker", "sft", "dir"]
    ]
    env = environment(Launch())
    assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 1024 < int(env["MASTER_PORT"]) < 32_768


def test_several_processes_are_started_by_torchrun_which_outwaits_the_grace() -> None:
    line = command(Launch(processes=4), "tasks.worker", ["ppo"], hostfile=HOSTS)
    assert line[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert "--nproc_per_node=4" in line
    assert line[-4:] == ["-m", "infra.rank", "tasks.worker", "ppo"]
    env = environment(Launch(processes=4, grace_seconds=12.5))
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "18"
    assert "RANK" not in env


def test_deepspeed_reads_the_processes_of_this_machine_from_a_hostfile(tmp_path: Path) -> None:
    line = command(Launch("deepspeed", processes=3), "tasks.worker", ["ppo"], hostfile=tmp_path / "worker.hosts")
    assert line[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert line[-4:] == ["--module", "infra.rank", "tasks.worker", "ppo"]
    assert (tmp_path / "worker.hosts").read_text() == "localhost slots=3\n"


def test_slurm_is_asked_for_nodes_gpus_and_what_the_block_says() -> None:
    gpus = Launch("slurm", nodes=2, processes=4, env={"DS_ACCELERATOR": "cuda"}, options=("--partition=gpu",))
    line = command(gpus, "tasks.worker", ["ppo"], hostfile=HOSTS)
    assert line[1:4] == ["-m", "infra.slurm", "srun"]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu"} <= set(line)
    assert line[-5:] == [sys.executable, "-m", "infra.rank", "tasks.worker", "ppo"]
    env = environment(gpus)
    assert "RANK" not in env  # a rank takes it from Slurm
    cpu = command(Launch("slurm", env={"DS_ACCELERATOR": "cpu"}), "tasks.worker", [], hostfile=HOSTS)
    assert not [word for word in cpu if word.startswith("--gpus")]


def test_leased_gpus_are_seen_whatever_the_launcher_sets() -> None:
    env = environment(Launch("deepspeed", processes=2, gpus=("0", "1", "2")), ("2", "1"))
    assert env["CUDA_VISIBLE_DEVICES"] == env["RLHF_VISIBLE_GPUS"] == "2,1"


def test_the_block_s_environment_wins() -> None:
    assert environment(Launch(env={"MASTER_PORT": "1234"}))["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    ("launcher", "ranks", "expected"),
    [
        (0, {0: 0, 1: 0}, 0),
        (1, {0: 75, 1: 75}, 75),
        (1, {0: 75, 1: 0}, 75),
        (1, {0: 75}, 1),  # the other one was killed before its checkpoint
        (1, {0: 75, 1: 2}, 2),
        (1, {1: 3}, 3),
        (137, {}, 137),
    ],
)
def test_exit_code(launcher: int, ranks: dict[int, int], expected: int) -> None:
    assert overall_exit_code(launcher, ranks, processes=2) == expected


def feed(tmp_path: Path, *chunks: bytes) -> tuple[Any, list[str], list[dict[str, Any]]]:
    lines: list[str] = []
    progress: list[dict[str, Any]] = []
    read_end, write_end = os.pipe()
    with (tmp_path / "log").open("wb") as log:
        output = launch._Output(os.fdopen(read_end, "rb", buffering=0), log, lines.append, progress.append, None)
        for chunk in chunks:
            os.write(write_end, chunk)
            output.read(1)
        os.close(write_end)
        output.close()
    return output, lines, progress


def test_progress_goes_to_its_callback_and_not_to_the_log(tmp_path: Path) -> None:
    output, lines, progress = feed(tmp_path, b'one\n@progress {"step": 1}\n@progr', b'ess {"step": 2}\ntwo')
    assert progress == [{"step": 1}, {"step": 2}]
    assert lines == ["one", "two"]
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert list(output.tail) == ["one", "two"]


def test_metrics_still_come_while_the_processes_are_being_stopped(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = []
    read_end, write_end = os.pipe()
    with (tmp_path / "log").open("wb") as log:
        output = launch._Output(os.fdopen(read_end, "rb", buffering=0), log, pytest.fail, pytest.fail, metrics.append)
        output.mute()
        os.write(write_end, b'@metrics {"step": 1}\nlast words\n@progress {}\n@metrics {"step": 2}\n')
        output.read(1)
        os.close(write_end)
        output.close()
    assert metrics == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "log").read_text() == "last words\n"


@pytest.mark.parametrize("text", ["@progress {broken", "@progress [1]", "see @progress {}"])
def test_what_only_looks_like_progress_is_a_line(tmp_path: Path, text: str) -> None:
    _, lines, progress = feed(tmp_path, text.encode() + b"\n")
    assert (lines, progress) == ([text], [])


def test_a_progress_bar_leaves_its_last_state_and_hides_no_message(tmp_path: Path) -> None:
    _, lines, progress = feed(tmp_path, b'\r 10%\r 50%\r100%\r\n\r 7%\r@progress {"step": 1}\n')
    assert lines == ["100%", " 7%"]
    assert progress == [{"step": 1}]


def test_bytes_that_are_no_text_are_kept_readable(tmp_path: Path) -> None:
    _, lines, _ = feed(tmp_path, b"a\xffb\n")
    assert lines == ["a\ufffdb"]


def test_the_tail_ends_with_the_first_failure_and_the_log_goes_on(tmp_path: Path) -> None:
    output, lines, _ = feed(tmp_path, b'reason\n@exit {"rank": 1, "code": 3}\ntorchrun talks\n')
    assert output.rank_codes == {1: 3}
    assert list(output.tail) == ["reason"]
    assert lines == ["reason", "torchrun talks"]


def test_a_callback_that_raises_loses_no_line_of_the_log(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise KeyboardInterrupt

    read_end, write_end = os.pipe()
    with (tmp_path / "log").open("wb") as log:
        output = launch._Output(os.fdopen(read_end, "rb", buffering=0), log, fail, None, None)
        os.write(write_end, b"one\ntwo\nthree")
        with pytest.raises(KeyboardInterrupt):
            output.read(1)
        output.mute()
        os.close(write_end)
        while output.read(0):
            pass
        output.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("program", "code", "printed"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("import sys; print(sys.argv[1:], __name__)", 0, "['x'] __main__"),
    ],
)
def test_a_rank_exits_as_its_module_does_and_tells_it_last(
    tmp_path: Path, program: str, code: int, printed: str
) -> None:
    (tmp_path / "some_module.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "infra.rank", "some_module", "x"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]), "RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code
    _, first, *lines, last = done.stdout.splitlines()  # a carriage return cuts off what stood in the line before
    assert first.startswith('@start {"rank": 1, "pid": ')
    assert last == f'@exit {{"rank": 1, "code": {code}}}'
    assert printed in "\n".join(lines)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_rank_writes_each_line_at_once_so_that_two_do_not_mix(tmp_path: Path, unbuffered: str) -> None:
    """Many images set PYTHONUNBUFFERED, under which Python's print makes two writes of a line."""
    (tmp_path / "some_module.py").write_text("import sys; print('one', 1); print('two', 2, file=sys.stderr)")
    read_end, write_end = os.pipe2(os.O_DIRECT)  # a reader gets each write by itself
    subprocess.run(
        [sys.executable, "-m", "infra.rank", "some_module"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]),
            "PYTHONUNBUFFERED": unbuffered,
        },
        stdout=write_end,
        stderr=write_end,
        check=True,
    )
    os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        writes = list(iter(lambda: pipe.read(4096), b""))
    assert writes[1:-1] == [b"one 1\n", b"two 2\n"]
    assert all(write.startswith(b"\r@") and write.endswith(b"\n") for write in (writes[0], writes[-1]))
