"""`rlhf ui`: both servers on the stores of local runs, found by the next run, and gone at the end."""

import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.servers import running_prefect_server


@pytest.mark.slow
def test_servers_answer_are_found_by_a_run_and_end(
    rlhf: Callable[..., Any], command: Callable[..., Any], folder: Path, prefect_home: Path
) -> None:
    ui = command("ui", "--workspace", str(folder / "workspace"))
    api = ui.wait_for(lambda: running_prefect_server(prefect_home))
    ended = rlhf("run", "--until", "clean").end()
    assert ended.code == 0, ended.output
    log = next((folder / "workspace" / "logs").glob("tiny-*.log")).read_text()
    assert f"View at {api.removesuffix('/api')}/runs" in log
    ui.process.send_signal(signal.SIGTERM)
    stopped = ui.end()
    assert stopped.code == 143
    assert stopped.left == []
    assert running_prefect_server(prefect_home) is None
    addresses = dict(re.findall(r"^(Prefect|MLflow): (\S+)$", stopped.output, re.MULTILINE))
    assert addresses["Prefect"] == api.removesuffix("/api")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(addresses["MLflow"], timeout=5)
