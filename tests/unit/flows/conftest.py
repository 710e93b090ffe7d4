from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.blend import GROUPS_SCHEMA
from data_prep.tables import PAIR_SCHEMA, write_table
from tasks import dag, stages
from tasks.config import RunConfig, parse
from tasks.stages import StageRef

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": 400, "positions": 512}
SOURCES = {"Dahoas/rm-static": {}, "stanfordnlp/SHP": {}}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A run config on the demo's data, with two of the sets."""
    return {
        "name": "unit",
        "workspace": str(tmp_path / "workspace"),
        "data": {"demo": {"pairs": 200}, "sources": {name: dict(options) for name, options in SOURCES.items()}},
        "models": {"policy": dict(TINY)},
    }


@pytest.fixture
def config(tree: dict[str, Any]) -> RunConfig:
    return parse(tree)


@pytest.fixture
def make_all() -> Callable[..., dict[str, StageRef]]:
    """(config, until=key) -> finished stages by key, each with a file that depends on what it is told and reads."""

    def make_all(config: RunConfig, until: str | None = None) -> dict[str, StageRef]:
        refs: dict[str, StageRef] = {}
        for key, node in dag.graph(config).items():
            stage = dag.stage(config, node, refs)

            def work(out: Path, stage: stages.Stage = stage) -> dict[str, Any]:
                read = "".join((ref.directory / "out.txt").read_text() for ref in stage.inputs.values())
                (out / "out.txt").write_text(f"{stage.name} {dict(stage.config)} {len(read)}")
                if stage.name == "blend":  # its groups are a part of the split's identity
                    for name, schema in (("train", PAIR_SCHEMA), ("test", PAIR_SCHEMA), ("groups", GROUPS_SCHEMA)):
                        write_table([], out / f"{name}.arrow", schema)
                return {"made": stage.name}

            refs[key] = stages.run(stage, work)
            if key == until:
                break
        return refs

    return make_all
