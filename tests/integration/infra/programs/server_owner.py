"""Stands for `rlhf run`: owns a Prefect server until it is killed. `python server_owner.py FOLDER`."""

import sys
import time
from pathlib import Path

from infra.servers import prefect_server

folder = Path(sys.argv[1])
with prefect_server(log=folder / "log") as server:
    server.announce(folder)
    server.wait_ready()
    (folder / "ready").touch()
    time.sleep(300)
