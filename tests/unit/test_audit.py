"""`make audit` with pip-audit and a server of advisories on this machine."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ADVISORY = {
    "id": "PYSEC-1",
    "aliases": ["CVE-1"],
    "summary": "It gives itself away.",
    "affected": [
        {
            "package": {"name": "leaky", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}
FOUND = [
    {
        "name": "leaky",
        "version": "1.0",
        "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"], "description": "It leaks."}],
    },
    {"name": "tight", "version": "2.0", "vulns": []},
]
EXCEPTION = {"id": "CVE-1", "package": "leaky", "reason": "not called", "until": date.today() + timedelta(days=9)}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options() -> Iterator[list[str]]:
    class Advisories(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps({"vulns": [ADVISORY]} if asked["package"]["name"] == "leaky" else {}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/"]
    server.shutdown()


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    (tmp_path / "pins.txt").write_text("leaky==1.0\ntight==2.0\n")
    return tmp_path / "pins.txt"


@pytest.mark.parametrize(
    ("exceptions", "code", "said"),
    [
        ([EXCEPTION], 0, "audit: 2 packages, 1 advisories, 0 to mend"),
        ([EXCEPTION | {"package": "tight"}], 1, "leaky 1.0: PYSEC-1"),
        ([EXCEPTION | {"until": date.today() - timedelta(days=1)}], 1, "exception CVE-1 has run out"),
        ([{"id": "CVE-1", "package": "leaky"}], 1, "needs id, package, reason, until"),
    ],
)
def test_an_advisory_fails_unless_a_person_let_it_pass(
    audit: Any, capsys: Any, exceptions: Any, code: int, said: str
) -> None:
    assert audit.report(FOUND, exceptions) == code
    assert said in capsys.readouterr().out


def test_packages_without_data_are_no_success(audit: Any, capsys: Any) -> None:
    assert audit.report([{"name": "leaky", "skip_reason": "not found"}], []) == 0
    assert "audit: NOT DONE, of none of the 1 packages can advisories be had here" in capsys.readouterr().out


@pytest.mark.slow
def test_an_advisory_is_found_in_the_pins(audit: Any, pins: Path, options: Any, capsys: Any) -> None:
    assert audit.main(pins, [], options) == 1
    assert "leaky 1.0: PYSEC-1, fixed in 1.1: It gives itself away." in capsys.readouterr().out


@pytest.mark.slow
def test_without_advisories_it_says_that_it_has_shown_nothing(audit: Any, pins: Path, capsys: Any) -> None:
    nobody = ["--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9/"]
    assert audit.main(pins, [], nobody) == 0
    assert "audit: NOT DONE, the advisories cannot be reached" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fault_of_its_own_is_none_of_the_network(audit: Any, tmp_path: Path) -> None:
    assert audit.main(tmp_path / "nothing.txt", [], []) != 0
