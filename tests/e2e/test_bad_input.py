"""What is wrong with a user's data or model shows as one sentence with the mend; nothing of it is taken for done."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tasks import tracking
from tasks.base import PAD, train_tokenizer
from tests.api import ask
from tests.code import bring_code
from tests.tiny import tiny_llama_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TEXTS = ["tell me of the red apple", "the apple is red and the pear is green"]


def saved(folder: Path, tokenizer: Any) -> Path:
    LlamaForCausalLM(tiny_llama_for(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base model with pad = eos and no spare token, as many published ones are."""
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.pad_token = tokenizer.eos_token
    folder = saved(tmp_path / "model", tokenizer)
    # The pad token that our own tokenizers have becomes an ordinary one, so that none is to spare.
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text().replace(PAD, "<|plain|>"))
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<|plain|>"]
    path.write_text(json.dumps(tree))
    return folder


@pytest.fixture
def run(rlhf: Callable[..., Any], tmp_path: Path, prefect_api: str) -> Callable[..., Any]:
    """(options) -> how `rlhf run` on the tiny config with a workspace of its own ended."""

    def start(*options: str) -> Any:
        settings = [f"workspace={tmp_path / 'workspace'}", *options]
        return rlhf("run", *(word for option in settings for word in ("--set", option)), api=prefect_api).end()

    return start


def refused(ended: Any, sentence: str) -> None:
    assert ended.code == 2, ended.output
    assert sentence in " ".join(ended.output.split())
    assert "Traceback" not in ended.output
    assert ended.left == []


def test_a_set_of_which_nothing_is_left(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,chosen,rejected\nwhy?,so,so\nhow?,,\n")
    ended = run("data.demo=null", f"data.sources={{mine: {{path: {tmp_path / 'mine.csv'}}}}}")
    refused(ended, "No train row of mine is left after cleaning 2 rows (empty 1, identical 1)")
    assert list((tmp_path / "workspace").glob("clean/*/manifest.json")) == []


def test_tokenizer_and_model_that_name_different_eos(run: Callable[..., Any], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 7}))
    ended = run(f"models.policy={model}")
    refused(ended, "The tokenizer ends answers with '<|end|>' (id 1), the model with 7: make eos_token_id the same")


@pytest.mark.timeout(900)
def test_code_of_a_model_runs_from_base_to_champion_only_where_the_config_says_so(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = saved(tmp_path / "model", train_tokenizer(iter(TEXTS), 300))
    ran = bring_code(model, "mine", tmp_path / "ran", tokenizer_too=True)
    refused(run(f"models.policy={model}"), "names code of its own (auto_map), which runs only where a config says so")
    assert not ran.exists()

    store = tracking.open_store(tmp_path / "workspace")  # a champion with the same code serves
    copytree(model, tmp_path / "served" / "model")
    tracking.register_version(store, "tiny-policy", tmp_path / "served", None, {"digest": "d"})
    tracking.set_alias(store, "tiny-policy", tracking.CHAMPION, 1)
    no_gold = "data.phases=[2, 4, 4]"  # for time
    ended = run(f"models.policy={model}", "models.policy_trust_remote_code=true", no_gold)
    assert ended.code == 0, ended.output
    assert ended.left == []
    champion = tracking.alias(store, "tiny-policy", tracking.CHAMPION)
    assert champion is not None
    assert champion.version == 2
    for stage in ("sft", "reward", "ppo"):
        (code,) = (tmp_path / "workspace" / stage).glob("*/model/mine.py")
        assert code.read_text() == (model / "mine.py").read_text(), stage
    processes = len(ran.read_text()) // len("ran")
    assert processes >= len(("base", "tokenise", "sft", "reward", "ppo", "evaluate", "compare"))


def test_pad_that_is_eos_gets_a_token_of_its_own(
    rlhf: Callable[..., Any], model: Path, tmp_path: Path, prefect_api: str
) -> None:
    workspace = tmp_path / "workspace"
    options = ("--set", f"workspace={workspace}", "--set", f"models.policy={model}", "--until", "sft")
    ended = rlhf("run", *options, api=prefect_api).end()
    assert ended.code == 0, ended.output
    before = AutoTokenizer.from_pretrained(model)
    (folder,) = workspace.glob("sft/*/model")
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert before.pad_token == before.eos_token == tokenizer.eos_token != tokenizer.pad_token
    assert trained.config.vocab_size == len(tokenizer) == len(before) + 1


def test_a_hub_that_is_down_is_asked_again_until_ctrl_c(
    command: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_api: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    tree = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"workspace": str(tmp_path / "workspace")}
    del tree["data"]["demo"]
    config, output = tmp_path / "hub.yaml", tmp_path / "output"
    config.write_text(yaml.safe_dump(tree))
    with output.open("w") as file:
        started = command("run", str(config), api=prefect_api, output=file)
        started.wait_for(lambda: "tried again in 30 s" in output.read_text())
        started.process.send_signal(signal.SIGINT)
        ended = started.end(seconds=20)  # not after the 30
    assert ended.code == 130
    text = output.read_text()
    assert "go online, or name a mirror folder with data.hub" in text
    assert "tried again in 5 s" in text
    assert "Stopped. What is finished stays" in text
    assert "Traceback" not in text
    assert ended.left == []


def test_a_training_that_diverges_is_not_tried_again(
    rlhf: Callable[..., Any], tmp_path: Path, prefect_api: str
) -> None:
    options = (f"workspace={tmp_path / 'workspace'}", "sft.optimizer.learning_rate=1e30", "sft.max_steps=8")
    ended = rlhf("run", *(word for option in options for word in ("--set", option)), api=prefect_api).end()
    assert ended.code == 1, ended.output
    assert "lower sft.optimizer.learning_rate" in " ".join(ended.output.split())
    assert ended.left == []
    tries = ask(prefect_api, "task_runs/filter", task_runs={"name": {"like_": "SFT"}}, sort="EXPECTED_START_TIME_DESC")
    assert tries[0]["run_count"] == 1
