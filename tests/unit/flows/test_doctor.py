import sqlite3
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tasks import doctor
from tasks.config import SIX_SETS


def test_every_check_says_something_and_none_makes_anything(tmp_path: Path) -> None:
    checks = dict(doctor.checks(tmp_path / "workspace", tmp_path))
    assert list(checks) == ["Python", "torch", "GPUs", "DeepSpeed", "Prefect", "MLflow", "hub", "disk"]
    for name in ("Python", "GPUs", "DeepSpeed", "Prefect", "MLflow", "disk"):
        assert checks[name]().text
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor micro")
    monkeypatch.setattr(sys, "version_info", version(3, 10, 1))
    assert doctor.python().state == "bad"


def test_a_cpu_build_of_torch_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpu_count", lambda: 2)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **o: type("Done", (), {"returncode": 0, "stdout": " 0\n"}))
    finding = doctor.torch()
    assert finding.state == "bad"
    assert "install a CUDA build" in finding.text


def test_without_a_compiler_only_offload_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.deepspeed()
    assert finding.state == "note"
    assert "g++" in finding.text


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(name, "http://someone:secret@127.0.0.1:9")
    finding = doctor.prefect() if name == "PREFECT_API_URL" else doctor.mlflow(tmp_path)
    assert finding.state == "bad"
    assert "or unset it" in finding.text
    assert name == "PREFECT_API_URL" or "secret" not in finding.text


def test_a_server_that_a_profile_of_prefect_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert "starts a server of its own" in doctor.prefect().text
    (tmp_path / "profiles.toml").write_text(
        'active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    )
    ask = "from tasks import doctor; print(doctor.prefect())"  # Prefect reads its profile once a process
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    assert "http://127.0.0.1:9/api does not answer" in said


def test_mlflow_store(tmp_path: Path) -> None:
    assert "makes its store" in doctor.mlflow(tmp_path).text
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table runs (id)")
    database.close()
    assert doctor.mlflow(tmp_path).text.endswith("with 0 runs")
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    assert doctor.mlflow(tmp_path).state == "bad"


def test_mirror(tmp_path: Path) -> None:
    for name in SIX_SETS[:-1]:
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "train-0.parquet").touch()
    finding = doctor.mirror(tmp_path)
    assert finding.state == "bad"
    assert SIX_SETS[-1] in finding.text
    assert SIX_SETS[0] not in finding.text
    (tmp_path / SIX_SETS[-1]).mkdir(parents=True)
    (tmp_path / SIX_SETS[-1] / "train-0.parquet").touch()
    assert doctor.mirror(tmp_path).state == "ok"
    assert doctor.mirror(tmp_path / "none").state == "bad"


def test_the_hub_offline_and_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in doctor.hub_answers().text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub_answers().text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(1, 1, 2**30))
    assert doctor.disk(tmp_path / "not" / "yet").state == "bad"
