"""Evaluation with real, tiny models: pairs, the champion's own tokenizer, and the summary."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from data_prep.conversation import Message
from data_prep.splits import EVAL_KEYS, KEYS_SCHEMA
from data_prep.tables import table_writer
from data_prep.tokenise import SCHEMAS
from data_prep.tokenizer import answer_ids, load_tokenizer, prompt_ids
from data_prep.trained import keep
from data_prep.unsupervised import CHUNK_SCHEMA
from tasks import evaluate
from tasks.base import train_tokenizer
from tasks.compared import comparison
from tasks.training.job import Job
from tasks.training.models import load_policy
from tests.code import bring_code
from tests.tiny import tiny_llama_for

TEXTS = ["Human: tell me of the red apple", "the apple is red and the pear is green", "a pear, an apple, a plum"]
QUESTIONS = ["tell me of the pear", "what is red?", "a plum or an apple", "is the pear green"]


def models(folder: Path, vocabulary: int, template: str | None, seed: int) -> dict[str, Path]:
    """A policy and a reward model with a tokenizer of their own."""
    tokenizer = train_tokenizer(iter(TEXTS), vocabulary)
    if template:
        tokenizer.chat_template = template
    config = tiny_llama_for(tokenizer, num_labels=1, initializer_range=0.3)
    torch.manual_seed(seed)
    for name, model_class in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"policy": folder / "policy", "reward": folder / "reward"}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict[str, Path]:
    return models(tmp_path_factory.mktemp("ours"), 300, None, 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> dict[str, Path]:
    """A model of another vocabulary and template."""
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    return models(tmp_path_factory.mktemp("other"), 280, template, 1)


@pytest.fixture
def data(ours, tmp_path) -> Path:
    tokenizer = load_tokenizer(ours["policy"])
    with table_writer(tmp_path / "ppo-eval.arrow", SCHEMAS["ppo"]) as writer:
        for question in QUESTIONS:
            messages = [Message(role="user", content=question)]
            ids = prompt_ids(tokenizer, messages)
            writer.append({"prompt": ids, "messages": messages, "source": "mine", "group": question})
    with table_writer(tmp_path / EVAL_KEYS, KEYS_SCHEMA) as writer:
        for number, question in enumerate(QUESTIONS):
            writer.append({"group": question, "keys": [number, 100 + number]})
    return tmp_path


def job(stage: str, directory: Path, data: Path, ours, trusted: tuple[str, ...] = (), **inputs: Path) -> Job:
    directory.mkdir()
    config = {"evaluate": {"prompts": 4, "batch_size": 2, "precision": "fp32"}, "seed": 5, "max_answer_tokens": 10}
    config["trusted"] = list(trusted)
    roles = {"data": data, "split": data, "tokenizer": ours["policy"], "reward": ours["reward"], **inputs}
    return Job(stage, directory, config, roles, torch.device("cpu"), lambda *_: None, lambda *_: None, lambda: False)


def evaluated(tmp_path: Path, data: Path, ours, ppo: Path) -> list[dict]:
    metrics = evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, sft=ours["policy"], ppo=ppo))
    assert metrics["prompts"] == 4
    return rows_of(tmp_path / "evaluate")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / evaluate.ANSWERS).read_text().splitlines()]


def test_the_same_policy_ties_with_itself(tmp_path, data, ours):
    rows = evaluated(tmp_path, data, ours, ours["policy"])
    assert all(row["sft"] == row["ppo"] and row["sft_reward"] == row["ppo_reward"] for row in rows)
    assert comparison(rows, "ppo", "sft")["win_rate"] == 0.5
    assert all(abs(row["sft_kl"]) < 1e-5 for row in rows)


def test_a_champion_with_the_same_tokenizer_answers_as_it_did(tmp_path, data, ours):
    rows = evaluated(tmp_path, data, ours, ours["policy"])
    metrics = evaluate.run(
        job("compare", tmp_path / "compare", data, ours, evaluate=tmp_path / "evaluate", champion=ours["policy"])
    )
    assert metrics["win_rate"] == 0.5
    compared = rows_of(tmp_path / "compare")
    assert [row["champion"] for row in compared] == [row["ppo"] for row in rows]
    assert [row["champion_reward"] for row in compared] == [row["ppo_reward"] for row in rows]


def test_a_champion_answers_again_only_where_its_own_evaluation_asked_other_prompts(tmp_path, data, ours, monkeypatch):
    rival = LlamaForCausalLM.from_pretrained(ours["policy"])
    with torch.no_grad():
        rival.lm_head.weight.copy_(rival.lm_head.weight.roll(1, 0))
    copytree(ours["policy"], tmp_path / "rival")
    rival.save_pretrained(tmp_path / "rival")
    for name, ppo in (("evaluate", ours["policy"]), ("then", tmp_path / "rival")):
        evaluate.run(job("evaluate", tmp_path / name, data, ours, sft=ours["policy"], ppo=ppo))
    inputs = {"evaluate": tmp_path / "evaluate", "champion": tmp_path / "rival"}
    anew = evaluate.run(job("compare", tmp_path / "anew", data, ours, **inputs))

    asked = []
    monkeypatch.setattr(evaluate, "load_policy", lambda path, *rest: asked.append(path) or load_policy(path))
    inputs["answered"] = tmp_path / "then"
    assert evaluate.run(job("compare", tmp_path / "read", data, ours, **inputs)) == anew
    assert rows_of(tmp_path / "read") == rows_of(tmp_path / "anew")
    assert asked == []

    then = rows_of(tmp_path / "then")
    (tmp_path / "then" / evaluate.ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in then[1:]))
    assert evaluate.run(job("compare", tmp_path / "again", data, ours, **inputs)) == anew
    assert asked == [tmp_path / "rival"]


def test_the_moving_average_is_held_against_the_last_policy(tmp_path, data, ours):
    average = LlamaForCausalLM.from_pretrained(ours["policy"])
    with torch.no_grad():
        average.lm_head.weight.copy_(average.lm_head.weight.roll(1, 0))  # another policy with the same tokenizer
    average.save_pretrained(tmp_path / "ema")
    roles = {"sft": ours["policy"], "ppo": ours["policy"], "ema": tmp_path / "ema"}
    metrics = evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, **roles))
    rows = rows_of(tmp_path / "evaluate")
    assert any(row["ema"] != row["ppo"] for row in rows)
    won = [(row["ema_reward"] > row["ppo_reward"]) + (row["ema_reward"] == row["ppo_reward"]) / 2 for row in rows]
    assert metrics["ema_win_rate"] == pytest.approx(sum(won) / len(won))
    assert metrics["ema_tokens"] == pytest.approx(sum(row["ema_tokens"] for row in rows) / len(rows))
    assert metrics["ema_per_source"]["mine"]["prompts"] == len(rows) == 4
    assert metrics["win_rate"] == 0.5, "PPO against SFT is not touched by it"


def test_the_gold_reward_model_scores_the_same_answers(tmp_path, data, ours, other):
    torch.manual_seed(7)
    config = LlamaForSequenceClassification.from_pretrained(ours["reward"]).config
    gold = LlamaForSequenceClassification(config)
    gold.save_pretrained(tmp_path / "gold")
    inputs = {"sft": ours["policy"], "ppo": ours["policy"], "gold": trained(tmp_path / "knows", tmp_path / "gold", 101)}
    metrics = evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, **inputs))
    rows, tokenizer = rows_of(tmp_path / "evaluate"), load_tokenizer(ours["policy"])
    assert metrics["prompts"] == len(rows) == 3, "the prompt that the gold model was trained on is left out"
    for row in rows:
        messages = [Message(role="user", content=row["prompt"].split("Human: ")[1].split("\n")[0])]
        ids = answer_ids(tokenizer, messages, Message(role="assistant", content=row["ppo"]))
        ids = prompt_ids(tokenizer, messages) + (ids if row["ppo_ended"] else ids[:-1])
        if len(ids) - len(prompt_ids(tokenizer, messages)) == row["ppo_tokens"]:  # the text says all of its tokens
            with torch.no_grad():
                assert row["ppo_gold"] == pytest.approx(float(gold.eval()(torch.tensor([ids])).logits[0, 0]), abs=1e-4)
        assert row["ppo_gold"] != row["ppo_reward"]
    assert metrics["gold_win_rate"] == 0.5
    compared = {**inputs, "evaluate": tmp_path / "evaluate", "champion": other["policy"]}
    found = evaluate.run(job("compare", tmp_path / "compare", data, ours, **compared))
    assert {"gold_win_rate", "win_rate_gap", "champion_gold"} <= set(found)


def test_the_gold_model_scores_what_ppo_kept_on_its_way(tmp_path, data, ours):
    ppo = copytree(ours["policy"], tmp_path / "ppo" / "model")
    kept = [(1, [5, 6], [7, 8], 1.0, 0.5), (1, [9], [10, 11], 3.0, 1.5), (4, [12, 13, 14], [15], -1.0, 8.0)]
    names = ("step", "prompt", "answer", "reward", "kl")
    rows = [dict(zip(names, row, strict=True)) for row in kept]
    (tmp_path / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, sft=ours["policy"], ppo=ppo, gold=ours["reward"]))
    pools = [json.loads(line) for line in (tmp_path / "evaluate" / evaluate.POOLS).read_text().splitlines()]
    assert [(pool["step"], pool["kl"], pool["reward"]) for pool in pools] == [(1, 1.0, 2.0), (4, 8.0, -1.0)]
    model = LlamaForSequenceClassification.from_pretrained(ours["reward"]).eval()
    with torch.no_grad():
        gold = [float(model(torch.tensor([row["prompt"] + row["answer"]])).logits[0, 0]) for row in rows]
    assert [pool["gold"] for pool in pools] == pytest.approx([(gold[0] + gold[1]) / 2, gold[2]], abs=1e-5)


def test_perplexity_is_that_of_the_language_model(tmp_path, data, ours):
    model = LlamaForCausalLM.from_pretrained(ours["policy"]).eval()
    text = [list(range(5, 13)), list(range(20, 28)), list(range(40, 48))]
    (tmp_path / "text").mkdir()
    with table_writer(tmp_path / "text" / "ptx-eval.arrow", CHUNK_SCHEMA) as writer:
        for tokens in text:
            writer.append({"tokens": tokens})
    inputs = {"sft": ours["policy"], "ppo": ours["policy"], "text": tmp_path / "text"}
    metrics = evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, **inputs))
    with torch.no_grad():
        expected = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in text]
    losses = [json.loads(line) for line in (tmp_path / "evaluate" / evaluate.TEXTS).read_text().splitlines()]
    assert [row["ppo_loss"] for row in losses] == pytest.approx(expected, abs=1e-4)
    assert metrics["sft_perplexity"] == pytest.approx(np.exp(np.mean(expected)), rel=1e-4)


def test_a_champion_with_another_tokenizer_is_asked_and_judged_by_text(tmp_path, data, ours, other, monkeypatch):
    evaluated(tmp_path, data, ours, ours["policy"])
    asked = []
    drawn = evaluate.sampling.answers
    monkeypatch.setattr(
        evaluate.sampling, "answers", lambda model, prompts, *how: asked.extend(prompts) or drawn(model, prompts, *how)
    )
    evaluate.run(
        job("compare", tmp_path / "compare", data, ours, evaluate=tmp_path / "evaluate", champion=other["policy"])
    )
    theirs, judged = load_tokenizer(other["policy"]), load_tokenizer(ours["reward"])
    assert [theirs.decode(ids) for ids in asked] == [f"<user>{question}<assistant>" for question in QUESTIONS]
    judge = LlamaForSequenceClassification.from_pretrained(ours["reward"]).eval()
    for row, question in zip(rows_of(tmp_path / "compare"), QUESTIONS, strict=True):
        messages = [Message(role="user", content=question)]
        ids = answer_ids(judged, messages, Message(role="assistant", content=row["champion"]))
        ids = prompt_ids(judged, messages) + (ids if row["champion_ended"] else ids[:-1])
        with torch.no_grad():
            expected = float(judge(torch.tensor([ids])).logits[0, 0])
        assert row["champion_reward"] == pytest.approx(expected, abs=1e-4)


def trained(folder: Path, base: Path, *keys: int) -> Path:
    """A copy of a model that was trained on these keys."""
    copytree(base, folder)
    keep(folder, [], np.array(keys, np.uint64))
    return folder


def test_prompts_that_an_ancestor_was_trained_on_are_not_asked(tmp_path, data, ours):
    ppo = trained(tmp_path / "ppo", ours["policy"], 7, 102)
    evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, sft=ours["policy"], ppo=ppo))
    first = [row["prompt"].split("Human: ")[1].split("\n")[0] for row in rows_of(tmp_path / "evaluate")]
    assert first == [QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]
    champion = trained(tmp_path / "champion", ours["policy"], 3)
    inputs = {"evaluate": tmp_path / "evaluate", "champion": champion, "candidate": ppo}
    metrics = evaluate.run(job("compare", tmp_path / "compare", data, ours, **inputs))
    assert metrics["prompts"] == 2
    ours_then = rows_of(tmp_path / "evaluate")[:2]
    assert [row["prompt"] for row in rows_of(tmp_path / "compare")] == [row["prompt"] for row in ours_then]
    assert [row["champion"] for row in rows_of(tmp_path / "compare")] == [row["ppo"] for row in ours_then]
    knows_all = trained(tmp_path / "knows-all", ours["policy"], 0, 1, 103)
    with pytest.raises(ValueError, match="were trained on every held-out prompt"):
        evaluate.run(job("compare", tmp_path / "none", data, ours, **inputs | {"champion": knows_all}))


def test_a_champions_code_runs_only_if_it_is_the_candidates_and_the_config_trusts_that(
    tmp_path, data, ours, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    candidate, same, other = (copytree(ours["policy"], tmp_path / name) for name in ("candidate", "same", "other"))
    ran, others = bring_code(candidate, "mine", tmp_path / "ran"), bring_code(other, "mine", tmp_path / "others")
    bring_code(same, "mine", ran)
    evaluate.run(job("evaluate", tmp_path / "evaluate", data, ours, ("ppo",), sft=ours["policy"], ppo=candidate))
    ran.unlink()

    def compare(name: str, champion: Path, *trusted: str) -> float:
        inputs = {"evaluate": tmp_path / "evaluate", "candidate": candidate, "champion": champion}
        return evaluate.run(job("compare", tmp_path / name, data, ours, trusted, **inputs))["win_rate"]

    for name, champion, trusted in (("a", other, ("candidate", "champion")), ("b", same, ())):
        with pytest.raises(ValueError, match="names code of its own"):
            compare(name, champion, *trusted)
    assert not ran.exists()
    assert not others.exists()
    assert compare("c", same, "candidate", "champion") == 0.5
    assert ran.exists()
