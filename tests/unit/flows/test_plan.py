import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import dag, plan
from tasks.config import ConfigError, RunConfig, parse
from tasks.dag import Choice
from tasks.shapes import GPUS
from tasks.stages import StageRef

ROOT = Path(__file__).parents[3]
MakeAll = Callable[..., dict[str, StageRef]]


def would_run(lines: list[plan.Line]) -> dict[str, str]:
    return {line.key: line.why for line in lines if not line.cached}


def test_nothing_is_made_yet(config: RunConfig) -> None:
    lines = plan.plan(config)
    assert would_run(lines)["demo"] == "not made yet"
    assert would_run(lines)["ppo"] == "after reward"
    assert len(would_run(lines)) == len(dag.graph(config))
    assert not Path(config.workspace).exists()


def test_a_hub_that_gives_no_answer(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def down(name: str, revision: str) -> str:
        raise ConnectionError("The hub gave no answer.")

    monkeypatch.setattr("data_prep.sources.commit_of", down)
    tree["data"] = {"sources": tree["data"]["sources"]}
    waiting = would_run(plan.plan(parse(tree)))
    assert waiting["download:stanfordnlp/SHP"] == "the hub gives no answer"
    assert waiting["clean:stanfordnlp/SHP"] == "after download"


def test_all_is_cached_and_says_what_came_out(config: RunConfig, make_all: MakeAll) -> None:
    make_all(config)
    lines = plan.plan(config)
    assert would_run(lines) == {}
    assert {line.key: line.metrics for line in lines}["sft"] == {"made": "sft"}


def test_a_changed_value_runs_its_stage_and_what_follows(tree: dict[str, Any], make_all: MakeAll) -> None:
    make_all(parse(tree))
    tree["ppo"] = {"kl_coef": 0.2}
    assert would_run(plan.plan(parse(tree))) == {"ppo": "changed: ppo.kl_coef", "evaluate": "after ppo"}


def test_a_damaged_file_is_found(config: RunConfig, make_all: MakeAll) -> None:
    refs = make_all(config)
    (refs["reward"].directory / "out.txt").write_text("something else")
    assert would_run(plan.plan(config)) == {
        "reward": "its files are damaged",
        "ppo": "after reward",
        "evaluate": "after ppo",
    }


def test_a_stage_that_was_interrupted_goes_on(config: RunConfig, make_all: MakeAll) -> None:
    refs = make_all(config, until="reward")
    stage = dag.stage(config, dag.graph(config)["ppo"], refs)
    (stage.directory / "checkpoints").mkdir(parents=True)
    assert would_run(plan.plan(config))["ppo"] == "was interrupted"
    (stage.directory / "checkpoints" / "latest.json").write_text('{"step": 40}')
    assert would_run(plan.plan(config))["ppo"] == "goes on from step 40"


def test_choice_is_followed(config: RunConfig, make_all: MakeAll) -> None:
    make_all(config)
    assert would_run(plan.plan(config, Choice(force="reward")))["reward"] == "forced"
    assert list(would_run(plan.plan(config, Choice(from_step="ppo")))) == ["ppo", "evaluate"]
    assert [line.key for line in plan.plan(config, Choice(until="blend"))][-1] == "blend"


def test_from_needs_all_before_it(config: RunConfig, make_all: MakeAll) -> None:
    make_all(config, until="split")
    plan.check_finished(config, Choice(from_step="split"))
    with pytest.raises(ConfigError, match="not finished: base, tokenise, sft; run without --from"):
        plan.check_finished(config, Choice(from_step="reward"))


def test_stages_of_which_the_same_is_said_stand_together(config: RunConfig, make_all: MakeAll) -> None:
    groups = plan.together(plan.plan(config))
    assert [len(group) for group in groups if group[0].stage == "clean"] == [2]
    refs = make_all(config)
    (refs["clean:stanfordnlp/SHP"].directory / "out.txt").unlink()
    groups = plan.together(plan.plan(config))
    assert [len(group) for group in groups if group[0].stage == "clean"] == [1, 1]


def test_a_plan_loads_nothing_heavy(tree: dict[str, Any]) -> None:
    program = f"""
import sys
from tasks import plan
from tasks.config import parse
plan.plan(parse({tree!r}))
print(sorted({{"torch", "prefect", "mlflow", "transformers", "datasets", "pandas"}} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_a_fit_names_the_configured_setting_and_the_fastest_that_fits() -> None:
    config = parse({"models": {"policy": {"hidden_size": 2048, "layers": 24, "heads": 32, "vocab_size": 49152}}})
    fits = {fit.stage: fit for fit in plan.will_it_fit(config, GPUS["a100-40"], 1)}
    assert list(fits) == ["sft", "reward", "gold", "ppo"]
    assert fits["sft"].setting.engine == config.sft.engine
    assert not fits["sft"].fits
    assert fits["sft"].cheapest is not None
    assert fits["sft"].cheapest.memory.needed <= GPUS["a100-40"].memory
    assert fits["sft"].cheapest.lora is None
    assert fits["ppo"].setting.memory.needed > fits["sft"].setting.memory.needed
    assert all(fit.fits for fit in plan.will_it_fit(config, replace(GPUS["h200"], memory=1e12), 1))


def test_a_fit_needs_the_models_sizes(tmp_path: Path) -> None:
    config = parse({"models": {"policy": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"--gpu needs the sizes of models\.policy, but .* has no config\.json here"):
        plan.will_it_fit(config, GPUS["h100"], 1)


LLAMA = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
    **{"num_attention_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True},
}


def test_a_reward_model_of_fewer_layers_is_planned_as_one_that_has_no_more(tmp_path: Path) -> None:
    def fits(base_layers: int, **reward: Any) -> dict[str, Any]:
        folders = {"policy": tmp_path / "24", "reward": tmp_path / str(base_layers)}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": int(folder.name)}))
        models = {role: str(folder) for role, folder in folders.items()}
        config = parse({"models": models, "reward": reward, "gold": {"layers": None}})
        return {fit.stage: fit.setting for fit in plan.will_it_fit(config, GPUS["h100"], 1)}

    cut, small, whole = fits(24, layers=10), fits(10), fits(24)
    assert (cut["reward"], cut["ppo"]) == (small["reward"], small["ppo"])
    assert cut["ppo"].memory.needed < whole["ppo"].memory.needed
    assert cut["gold"] == whole["gold"]
    with pytest.raises(ConfigError, match=r"reward\.layers is 25, but the model has 24 layers; lower it"):
        fits(24, layers=25)


def test_a_reward_model_keeps_no_more_layers_than_its_base_has(tmp_path: Path) -> None:
    def check(**more: Any) -> None:
        plan.check_reward_models(parse({"models": {"policy": str(tmp_path)}} | more))

    check(reward={"layers": 99})  # not known here
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    check(reward={"layers": 24, "frozen_layers": 24})
    with pytest.raises(ConfigError, match=r"^gold\.layers is 25, but the model has 24 layers; lower it"):
        check(gold={"layers": 25})
    with pytest.raises(ConfigError, match=r"^reward\.frozen_layers is 25, but the model has 24 layers; lower it"):
        check(reward={"frozen_layers": 25})
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    check(reward={"layers": 99})
    check(models={"policy": "no name/of the hub"}, reward={"layers": 99})


def test_a_base_has_positions_for_what_it_reads(tmp_path: Path) -> None:
    def check(role: str, model: dict[str, Any], **data: Any) -> None:
        folder = tmp_path / role
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        tree = {"models": {"policy": str(tmp_path / "elsewhere")} | {role: str(folder)}, "data": data}
        plan.check_lengths(parse(tree))

    short = {"model_type": "opt", "max_position_embeddings": 512}
    text = {"unsupervised": {"path": "text.txt", "chunk_tokens": 513}}
    check("policy", short)
    check("reward", short, **text)  # which it does not read
    for model in (short, {"model_type": "gpt2", "n_positions": 512}, LLAMA | {"max_position_embeddings": 512}):
        for role in ("policy", "reward"):
            said = rf"^data\.max_prompt_tokens \+ data\.max_answer_tokens is 513, but models\.{role} has 512 positions"
            said += r" for tokens; lower data\.max_prompt_tokens or data\.max_answer_tokens$"
            with pytest.raises(ConfigError, match=said):
                check(role, model, max_prompt_tokens=257)
        with pytest.raises(ConfigError, match=r"^data\.unsupervised\.chunk_tokens is 513, but models\.policy has 512"):
            check("policy", model, **text)
    for key, name in (("rope_scaling", "type"), ("rope_parameters", "rope_type")):  # how far they reach is not told
        check("policy", LLAMA | {"max_position_embeddings": 512, key: {name: "yarn"}}, max_prompt_tokens=257)
    check("policy", {"model_type": "mine"}, max_prompt_tokens=257)


def test_a_measured_peak_stands_beside_its_prediction(tmp_path: Path) -> None:
    shape = dict(LLAMA)
    config = parse({"models": {"policy": {"hidden_size": 2048, "layers": 24, "heads": 32, "vocab_size": 49152}}})

    def made(stage: str, metrics: dict[str, float]) -> StageRef:
        (tmp_path / stage / "model").mkdir(parents=True)
        (tmp_path / stage / "model" / "config.json").write_text(json.dumps(shape))
        return StageRef(stage, "f" * 16, "d" * 64, str(tmp_path / stage), False, 1.0, metrics)

    refs = {"sft": made("sft", {"peak_gib": 40.0}), "reward": made("reward", {}), "ppo": made("ppo", {"peak_gib": 50})}
    (sft, ppo) = plan.measured(config, refs)
    assert (sft.stage, ppo.stage) == ("sft", "ppo")
    predicted = sft.setting.memory.allocated / 2**30
    assert sft.compared == f"40.0 GiB measured, {predicted:.1f} predicted ({100 * (predicted / 40 - 1):+.0f}%)"
    planned = {fit.stage: fit for fit in plan.will_it_fit(config, GPUS["h100"], 1, {"sft": {"peak_gib": 40.0}})}
    assert planned["sft"].compared == sft.compared
    assert planned["ppo"].compared == ""
    assert plan.measured(config, {"sft": made("reward-base", {})}) == []
    shape["num_hidden_layers"] = 20  # a gold reward model of more layers, which is not made, is not asked for
    made_so_far = {"sft": refs["sft"], "reward": made("cut", {"peak_gib": 9.0})}
    cut = parse({"models": {"policy": str(tmp_path)}, "reward": {"layers": 20}, "gold": {"layers": 22}})
    assert [fit.stage for fit in plan.measured(cut, made_so_far)] == ["sft", "reward"]
    (tmp_path / "sft" / "model" / "config.json").write_text('{"model_type": "mamba"}')
    assert plan.measured(config, refs) == []
