import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import dag, stages
from tasks.config import SIX_SETS, ConfigError, RunConfig, parse
from tasks.dag import Choice
from tasks.stages import StageRef


def with_(tree: dict[str, Any], **changes: Any) -> dict[str, dag.Node]:
    """The graph of a config with some values, given by `section__key=value`, changed."""
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value
    return dag.graph(parse(tree))


def changed(before: dict[str, dag.Node], after: dict[str, dag.Node]) -> set[str]:
    return {key for key in after if after[key] != before.get(key)}


def model_folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return path


def test_every_node_comes_after_what_it_reads(config: RunConfig) -> None:
    seen: set[str] = set()
    for key, node in dag.graph(config).items():
        assert set(node.inputs.values()) <= seen, key
        seen.add(key)


def test_every_stage_has_its_code(config: RunConfig) -> None:
    from tasks.stages import code_digest

    digests = {node.stage: code_digest(node.roots) for node in dag.graph(config).values()}
    assert set(digests) == set(dag.STAGES) - {"ptx", "verdicts"}
    assert digests.pop("gold") == digests["reward"], "one trainer"
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"ppo__kl_coef": 0.2}, {"ppo"}),
        ({"sft__epochs": 2}, {"sft"}),
        ({"reward__epochs": 2}, {"reward", "gold"}),
        ({"gold__epochs": 2}, {"gold"}),
        ({"ppo__seed": 3}, {"ppo"}),
        ({"reward__seed": 3}, {"reward", "gold"}),
        ({"sft__seed": 0}, set()),  # the run's own
        ({"promote__judge": "reward"}, set()),
        ({"evaluate__prompts": 3}, {"evaluate"}),
        ({"data__max_chars": 99}, {"clean:Dahoas/rm-static", "clean:stanfordnlp/SHP"}),
        ({"data__phases": [1, 1, 1, 1]}, {"split"}),
        ({"data__phases": [1, 1, 1]}, {"split", "evaluate"}),
        ({"data__demo": {"pairs": 300}}, {"demo"}),
        ({"data__max_prompt_tokens": 99}, {"tokenise"}),
        ({"promote__gates": {"kl": "<= 15"}}, set()),
        ({"name": "other"}, set()),
        ({"infrastructure": "one-gpu"}, set()),
    ],
)
def test_a_change_touches_the_stages_that_it_is_about(
    tree: dict[str, Any], change: dict[str, Any], keys: set[str]
) -> None:
    before = dag.graph(parse(tree))
    assert changed(before, with_(tree, **change)) == keys


def test_unsupervised_text_is_measured_on_and_learnt_from(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line.\n")
    without = dag.graph(parse(tree))
    before = with_(tree, data__unsupervised={"path": str(tmp_path / "text.txt")})
    assert changed(without, before) == {"download:unsupervised", "ptx", "evaluate"}
    after = with_(tree, ppo__ptx_coef=0.5)
    assert changed(before, after) == {"ppo"}
    assert after["ppo"].inputs["text"] == after["evaluate"].inputs["text"] == "ptx"
    assert changed(after, with_(tree, data__unsupervised__chunk_tokens=64)) == {"ptx"}
    with pytest.raises(ConfigError, match=r"ppo\.ptx_coef is 0\.5, but there is no unsupervised text; name some"):
        with_(tree, data__unsupervised=None)
    with pytest.raises(ConfigError, match=r"data\.unsupervised\.path: there is no file or folder /nowhere"):
        with_(tree, data__unsupervised={"path": "/nowhere"})


def test_options_of_one_source_clean_only_that_source(tree: dict[str, Any]) -> None:
    before = dag.graph(parse(tree))
    tree["data"]["sources"]["stanfordnlp/SHP"] = {"max_rows": 5, "max_pairs_per_prompt": 2}
    after = dag.graph(parse(tree))
    assert changed(before, after) == {"clean:stanfordnlp/SHP"}
    settings = after["clean:stanfordnlp/SHP"].config
    assert (settings["max_rows"], settings["max_pairs_per_prompt"]) == (5, 2)


def test_order_of_sources_counts_in_the_blend(tree: dict[str, Any]) -> None:
    before = dag.graph(parse(tree))
    tree["data"]["sources"] = dict(reversed(tree["data"]["sources"].items()))
    assert changed(before, dag.graph(parse(tree))) == {"blend"}


def test_a_changed_file_of_the_mirror_is_noticed(tree: dict[str, Any], tmp_path: Path) -> None:
    for name in tree["data"]["sources"]:
        (tmp_path / "hub" / name / "data").mkdir(parents=True)
        (tmp_path / "hub" / name / "data" / "train-00000-of-00001.parquet").write_bytes(b"one")
    tree["data"] |= {"demo": None, "hub": str(tmp_path / "hub")}
    before = dag.graph(parse(tree))
    assert changed(before, dag.graph(parse(tree))) == set()
    file = tmp_path / "hub" / "stanfordnlp/SHP" / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert changed(before, dag.graph(parse(tree))) == {"download:stanfordnlp/SHP"}


def test_a_model_that_is_there_is_checked_before_any_data(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors")
    graph = with_(tree, models__policy=str(folder))
    assert next(iter(graph)) == "base"
    assert graph["base"].inputs == {}
    (folder / "model.safetensors").write_bytes(b"weights")
    assert dag.graph(parse(tree))["base"] != graph["base"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "there is no model folder"),
        ((), "it has no config.json"),
        (("config.json", "tokenizer_config.json"), "holds no tokenizer"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "holds no weights in safetensors format"),
    ],
)
def test_model_folders_that_are_none(
    tree: dict[str, Any], tmp_path: Path, files: tuple[str, ...] | None, sentence: str
) -> None:
    if files is not None:
        model_folder(tmp_path / "model", *files)
    with pytest.raises(ConfigError, match=f"^models.policy: .*{sentence}"):
        with_(tree, models__policy=str(tmp_path / "model"))


def test_the_six_sets_are_those_that_data_preparation_knows() -> None:
    from data_prep.sources import SOURCES

    assert tuple(SOURCES) == SIX_SETS


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"hub": "/nowhere"}, "data.hub: there is no folder /nowhere"),
        ({"hub": "HERE"}, r"has no folder Dahoas/rm-static"),
        ({"sources": {"Dahoas/rm-statik": {}}}, "did you mean Dahoas/rm-static"),
        ({"sources": {"own": {"path": "/nowhere.jsonl"}}}, "data.sources.own.path: there is no file"),
    ],
)
def test_local_input_that_is_not_there(
    tree: dict[str, Any], tmp_path: Path, data: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "hub").mkdir()
    data = {key: str(tmp_path / "hub") if value == "HERE" else value for key, value in data.items()}
    tree["data"] |= {"demo": None, **data}
    with pytest.raises(ConfigError, match=sentence):
        dag.graph(parse(tree))


def test_reward_model_with_a_base_of_its_own(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors")
    graph = with_(tree, models__reward=str(folder))
    assert graph["reward"].inputs["base"] == "reward-base"
    assert graph["reward-base"].stage == "base"
    assert graph["ppo"].inputs["sft"] == "sft"
    assert graph["gold"].inputs["base"] == "reward-base"


def test_a_judge_behind_an_api_reads_the_answers_and_its_pace_is_no_part_of_the_result(tree: dict[str, Any]) -> None:
    asked = with_(tree, evaluate__api_judge={"model": "m"})
    assert asked["verdicts"].inputs == {"evaluate": "evaluate"}
    assert changed(with_(tree, evaluate__api_judge=None), asked) == {"verdicts"}
    slower = {"model": "m", "calls_per_minute": 3, "key_variable": "OTHER"}
    assert changed(asked, with_(tree, evaluate__api_judge=slower)) == set()
    assert changed(asked, with_(tree, evaluate__api_judge={"model": "other"})) == {"verdicts"}


def test_the_gold_reward_model_is_one_that_ppo_never_sees(tree: dict[str, Any], tmp_path: Path) -> None:
    graph = with_(tree, reward__epochs=3, gold__optimizer={"learning_rate": 0.5})
    gold = graph["gold"]
    assert gold.config["phase"] == "judge"
    assert gold.config["seed"] != graph["reward"].config["seed"]
    assert (gold.config["gold"]["epochs"], gold.config["gold"]["optimizer"]["learning_rate"]) == (3, 0.5)
    assert "gold" not in graph["ppo"].inputs
    assert graph["evaluate"].inputs["gold"] == "gold"
    # What starts from a registered reward model shares its errors, so the gold one starts from the SFT model then.
    folder = model_folder(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors")
    warm = with_(tree, models__reward=str(folder), models__reward_revision="models:/chat-reward/3")
    assert (warm["reward"].inputs["base"], warm["gold"].inputs["base"]) == ("reward-base", "sft")
    without = with_(tree, data__phases=[1, 1, 1])
    assert "gold" not in without
    assert "gold" not in without["evaluate"].inputs


def test_choice_from_a_step_forces_it_and_what_follows() -> None:
    choice = Choice(from_step="reward")
    assert [name for name in dag.STAGES if choice.forces(name)] == [*("reward", "gold", "ppo", "evaluate", "verdicts")]
    assert [name for name in dag.STAGES if choice.must_be_finished(name)][-1] == "sft"
    assert [name for name in dag.STAGES if Choice(force="sft").forces(name)] == ["sft"]


def test_until_is_reached_when_all_nodes_of_the_stage_are_done(config: RunConfig) -> None:
    graph, choice = dag.graph(config), Choice(until="clean")
    assert not choice.is_reached(graph, {"clean:Dahoas/rm-static"})
    assert choice.is_reached(graph, {"clean:Dahoas/rm-static", "clean:stanfordnlp/SHP"})
    assert not Choice().is_reached(graph, set(graph))
    assert not Choice(until="register").is_reached(graph, set(graph))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"from_step": "sftt"}, "--from sftt: unknown step; did you mean sft"),
        ({"force": "promote"}, "--force promote: unknown step"),
        ({"from_step": "ppo", "until": "sft"}, "--until sft comes before --from ppo"),
    ],
)
def test_choices_that_are_none(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Choice(**options)


def test_a_stage_that_the_run_has_not(tree: dict[str, Any]) -> None:
    tree["data"] |= {"demo": None, "sources": {"own": {"path": __file__}}}
    with pytest.raises(ConfigError, match="--until demo: this run has no such stage"):
        Choice(until="demo").check(dag.graph(parse(tree)))


@pytest.fixture
def first(tree: dict[str, Any], make_all: Callable[..., dict[str, StageRef]]) -> dict[str, StageRef]:
    """The stages of a run whose policy is the champion now; `tree` is then that of a run with other settings of PPO."""
    refs = make_all(parse(tree))
    tree["ppo"] = {"kl_coef": 0.2}
    return refs


def test_a_comparison_reads_the_champions_own_evaluation_where_it_was_of_the_same_kind(
    tree: dict[str, Any], first: dict[str, StageRef], make_all: Callable[..., dict[str, StageRef]]
) -> None:
    champion, config = replace(first["ppo"], stage="champion"), parse(tree)
    refs = make_all(config)
    assert dag.comparison(config, refs, champion).inputs["answered"] == replace(first["evaluate"], cached=True)
    for change in (
        {"evaluate": {"prompts": 3}},
        {"reward": {"epochs": 2}},
        {"data": {**tree["data"], "max_prompt_tokens": 99}},
    ):
        other = parse({**tree, **change})
        assert "answered" not in dag.comparison(other, make_all(other), champion).inputs, change
    (first["evaluate"].directory / "out.txt").write_text("damaged")
    assert "answered" not in dag.comparison(config, refs, champion).inputs


def test_a_comparison_that_was_made_without_it_is_not_made_again(
    tree: dict[str, Any], first: dict[str, StageRef], make_all: Callable[..., dict[str, StageRef]]
) -> None:
    champion, config = replace(first["ppo"], stage="champion"), parse(tree)
    refs = make_all(config)
    answered = first["evaluate"].directory
    answered.rename(answered.with_name("elsewhere"))
    made = stages.run(dag.comparison(config, refs, champion), lambda out: {})
    answered.with_name("elsewhere").rename(answered)
    assert stages.finished(dag.comparison(config, refs, champion)) == replace(made, cached=True)
