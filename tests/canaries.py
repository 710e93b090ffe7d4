"""Secrets that a user's environment may hold, made up, and where they turn up afterwards."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

CANARIES = {
    "hub": "hf_CanaryOfTheHub7351",
    "judge": "sk-canary-of-the-judge-7351",
    "mlflow": "canary-of-mlflow-7351",
    "database": "canary-of-the-database-7351",
    "webhook": "canary-of-the-webhook-7351",
}


def environment(mlflow: str) -> dict[str, str]:
    """The variables that hold the secrets; `mlflow` is the address of an MLflow server, which is asked by password."""
    return {
        "HF_TOKEN": CANARIES["hub"],
        "JUDGE_KEY": CANARIES["judge"],
        "MLFLOW_TRACKING_URI": mlflow.replace("//", f"//team:{CANARIES['mlflow']}@"),
        "MLFLOW_TRACKING_USERNAME": "team",
        "MLFLOW_TRACKING_PASSWORD": CANARIES["mlflow"],
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://team:{CANARIES['database']}@127.0.0.1:1/prefect",
    }


def found_in(places: Mapping[str, bytes]) -> list[str]:
    """Which secret stands where."""
    return [
        f"{name} in {place}"
        for place, text in places.items()
        for name, secret in CANARIES.items()
        if secret.encode() in text
    ]


def files(folders: Iterable[Path]) -> dict[str, bytes]:
    """The bytes of every file below folders; of a SQLite database its rows too, which in the file lie in pieces."""
    found: dict[str, bytes] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                found[str(path)] = path.read_bytes()
                if found[str(path)].startswith(b"SQLite format 3"):
                    found[f"rows of {path}"] = "\n".join(_rows(path)).encode()
    return found


def _rows(database: Path) -> Iterator[str]:
    with closing(sqlite3.connect(database)) as connection:
        for (table,) in connection.execute("select name from sqlite_master where type = 'table'").fetchall():
            for row in connection.execute(f'select * from "{table}"'):
                yield repr(row)
