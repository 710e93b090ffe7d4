import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tasks import lineage, lineage_graph, tracking
from tasks.stages import Stage, run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("workspace"))


def made(workspace: Path, name: str, inputs=None, metrics=None, text="", force=False, **config):
    def work(directory):
        (directory / "out.txt").write_text(text or name)
        return metrics or {}

    made_by = {"flow_run_id": "flow", "mlflow_run": "run"}
    return run(Stage(name, workspace, config, inputs or {}, ()), work, made_by=made_by, force=force)


def chain(workspace: Path, revision: str) -> dict:
    """Two sets, one of them at `revision`, to a policy that reads the base by two ways."""
    refs = {}
    for source, commit in (("Dahoas/rm-static", revision), ("openai/webgpt_comparisons", "c0ffee1234")):
        rows = {"revision": commit, "rows": {"train": 90, "test": 10}}
        refs["raw"] = made(workspace, "download", {}, rows, text=commit, source=source, revision=commit)
        counts = {"total": {"kept": 80, "rows_in": 100}}
        refs[source] = made(workspace, "clean", {"raw": refs["raw"]}, counts, text=commit, source=source)
    cleaned = {name: ref for name, ref in refs.items() if "/" in name}
    refs["blend"] = made(workspace, "blend", cleaned, {"train": 150, "test": 10}, text=revision)
    refs["base"] = made(workspace, "base", metrics={"vocabulary": 9}, model="org/base", revision="b45e", token="hf_x")
    refs["sft"] = made(workspace, "sft", {"data": refs["blend"], "base": refs["base"]}, {"perplexity": 2.5}, revision)
    ppo = {"first_reward": 0.0, "reward": 1.0, "kl": 3.0}
    refs["ppo"] = made(workspace, "ppo", {"data": refs["blend"], "sft": refs["sft"]}, ppo, revision)
    return refs


def registered(store, name: str, refs: dict) -> tracking.Version:
    folder = Path(store.workspace) / "register" / f"{name}-{refs['ppo'].fingerprint}"
    folder.mkdir(parents=True)
    lineage.write(folder, refs["ppo"].directory)
    tags = {"digest": refs["ppo"].digest + name}
    return tracking.find_version(store, name, tracking.register_version(store, name, folder, None, tags))


def test_the_record_holds_every_step_once_and_after_what_it_reads(tmp_path):
    refs = chain(tmp_path, "abc")
    record = lineage.gather(refs["ppo"].directory)
    names = list(record["steps"])
    assert len(names) == 8  # two downloads, two cleanings, blend, base, SFT, PPO
    assert record["root"] == names[-1] == f"ppo/{refs['ppo'].fingerprint}"
    for name, step in record["steps"].items():
        assert all(names.index(read) < names.index(name) for read in step["inputs"].values())
        assert step["made_by"] == {"flow_run_id": "flow", "mlflow_run": "run"}


def test_it_answers_for_data_base_and_code(tmp_path):
    record = lineage.gather(chain(tmp_path, "abc")["ppo"].directory)
    found = {source.name: (source.revision, source.rows, source.kept) for source in lineage.sources(record)}
    assert found == {"Dahoas/rm-static": ("abc", 100, 80), "openai/webgpt_comparisons": ("c0ffee1234", 100, 80)}
    assert lineage.bases(record) == [("org/base", "b45e")]
    step = {"code": {"commit": "0123456789abcdef", "dirty": True}}
    assert lineage.commits({"steps": {"a": step, "b": step, "c": {}}}) == ["0123456789+changes"]


def test_secrets_of_a_config_stay_out(tmp_path):
    assert "hf_x" not in json.dumps(lineage.gather(chain(tmp_path, "abc")["ppo"].directory))


def test_a_stage_that_is_gone_or_was_made_anew_is_named(tmp_path):
    refs = chain(tmp_path, "abc")
    made(tmp_path, "base", text="other weights", force=True, model="org/base", revision="b45e", token="hf_x")
    with pytest.raises(ValueError, match=f"base/{refs['base'].fingerprint} was made anew since"):
        lineage.gather(refs["ppo"].directory)
    shutil.rmtree(refs["base"].directory)
    with pytest.raises(ValueError, match=f"base/{refs['base'].fingerprint} is not in"):
        lineage.gather(refs["ppo"].directory)


def test_a_version_answers_after_its_stages_are_gone(store):
    refs = chain(Path(store.workspace), "gone-soon")
    version = registered(store, "gone-policy", refs)
    shutil.rmtree(refs["sft"].directory)
    assert {source.revision for source in lineage.sources(lineage.of_version(store, version))} == {
        "gone-soon",
        "c0ffee1234",
    }
    assert tracking.named_version(store, "models:/gone-policy/1") == version


def test_impact_finds_the_versions_that_a_revision_went_into(store):
    old, new = (registered(store, "two-policy", chain(Path(store.workspace), name)) for name in ("aaa111", "bbb222"))
    found = lineage.impact(store, "Dahoas/rm-static", "aaa")
    assert [(version.name, version.version) for version, _ in found] == [("two-policy", old.version)]
    both = {
        version.version for version, _ in lineage.impact(store, "Dahoas/rm-static", None) if version.name == new.name
    }
    assert both == {old.version, new.version}
    with pytest.raises(ValueError, match=r"No registered model comes from Dahoas/rm-static@fff\. Known: .*aaa111"):
        lineage.impact(store, "Dahoas/rm-static", "fff")


def test_a_warm_start_answers_for_its_ancestors_too(store):
    workspace = Path(store.workspace)
    first = chain(workspace, "tainted")
    ancestor = registered(store, "warm-policy", first)
    folder = Path(ancestor.source.removeprefix("file://"))
    base = made(workspace, "base", model=str(folder / "model"), revision="models:/warm-policy/1")
    sft = made(workspace, "sft", {"base": base}, {"perplexity": 2.5}, "warm")
    record = lineage.gather(made(workspace, "ppo", {"sft": sft}, text="warm").directory)
    assert record["steps"][f"base/{base.fingerprint}"]["inputs"] == {"started from": f"ppo/{first['ppo'].fingerprint}"}
    assert {source.revision for source in lineage.sources(record)} == {"tainted", "c0ffee1234"}
    assert lineage.bases(record) == [("org/base", "b45e"), ("models:/warm-policy/1", "")]
    child = registered(store, "warm-policy", {"ppo": made(workspace, "ppo", {"sft": sft}, text="warm")})
    hit = {version.version for version, _ in lineage.impact(store, "Dahoas/rm-static", "tainted")}
    assert hit == {ancestor.version, child.version}


def test_a_version_without_a_record(store, tmp_path):
    number = tracking.register_version(store, "old-policy", tmp_path, None, {"digest": "d"})
    with pytest.raises(ValueError, match=r"old-policy version 1 keeps no lineage\.json"):
        lineage.of_version(store, tracking.find_version(store, "old-policy", number))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/none@champion", "There is no registered model none"),
        ("models:/named-policy@best", "named-policy has no alias best; it has champion"),
        ("models:/named-policy/9", "named-policy has no version 9; it has 1, 2"),
        ("models:/named-policy/x", "write a version as models:/named-policy/3"),
    ],
)
def test_versions_by_name(store, tmp_path, name, message):
    for digest in ("one", "two"):
        tracking.register_version(store, "named-policy", tmp_path, None, {"digest": digest})
    tracking.set_alias(store, "named-policy", "champion", 1)
    assert tracking.named_version(store, "models:/named-policy@champion").version == 1
    assert tracking.named_version(store, "named-policy/2").version == 2
    assert tracking.named_version(store, "named-policy").version == 1
    with pytest.raises(ValueError, match=message):
        tracking.named_version(store, name)


def test_markdown_names_each_step_once_with_links(tmp_path):
    record = lineage.gather(chain(tmp_path, "abc")["ppo"].directory)
    text = lineage.markdown(record, lambda made_by: {"Prefect run": f"/runs/flow-run/{made_by['flow_run_id']}"})
    assert text.count("[Prefect run](/runs/flow-run/flow)") == 8
    assert "Dahoas/rm-static@abc · 100 rows" in text
    assert text.count("see above") == 1  # PPO's data, which SFT has read


def test_the_graph_is_drawn_with_every_step_as_text(tmp_path, store):
    refs = chain(tmp_path, "abc")
    record = lineage.gather(refs["ppo"].directory)
    texts = {element.text for element in ElementTree.fromstring(lineage_graph.draw(record)).iter() if element.text}
    for ref in (refs["ppo"], refs["sft"], refs["base"]):
        assert ref.fingerprint[:10] in texts
    assert "@abc" in texts
    assert lineage_graph.draw(record, "png").startswith(b"\x89PNG")


def test_a_manifest_that_names_what_is_no_stage_is_refused(tmp_path):
    refs = chain(tmp_path, "abc")
    file = refs["ppo"].directory / "manifest.json"
    manifest = json.loads(file.read_text())
    for forged in ({"stage": ".."}, {"stage": "/"}, {"fingerprint": "../../evil"}, {"fingerprint": str(tmp_path)}):
        inputs = manifest["inputs"] | {"sft": manifest["inputs"]["sft"] | forged}
        file.write_text(json.dumps(manifest | {"inputs": inputs}))
        with pytest.raises(ValueError, match="names no stage"):
            lineage.gather(refs["ppo"].directory)
