"""Prefect's API as the tests ask it: over HTTP, as a page of its UI does."""

import json
import time
import urllib.error
import urllib.request
from typing import Any


def ask(api: str, path: str, **body: Any) -> Any:
    """An answer to a POST; asks again while the server's SQLite is busy (503)."""
    request = urllib.request.Request(f"{api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return _answer(request)


def run_of(api: str, run_id: str) -> dict[str, Any]:
    """A flow run."""
    (run,) = ask(api, "flow_runs/filter", flow_runs={"id": {"any_": [run_id]}})
    return run


def start(api: str, name: str, **parameters: Any) -> str:
    """Asks for a run of a deployment, as the button of its page does, and returns its id."""
    (deployment,) = ask(api, "deployments/filter", deployments={"name": {"any_": [name]}})
    asked = {"type": "SCHEDULED"}
    return ask(api, f"deployments/{deployment['id']}/create_flow_run", state=asked, parameters=parameters)["id"]


def states(api: str, run_id: str) -> list[dict[str, Any]]:
    """The states that a run has had, in order."""
    return _answer(f"{api}/flow_run_states/?flow_run_id={run_id}")


def _answer(request: Any) -> Any:
    for _ in range(5):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(2)
    raise AssertionError(f"{request}: the server stays busy")
