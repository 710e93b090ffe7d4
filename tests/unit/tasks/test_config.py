from pathlib import Path

import pytest

from tasks.config import SIX_SETS, ConfigError, load, parse


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: unit\n")
    return path


def test_setting_one_source_keeps_the_others(file: Path) -> None:
    config = load(file, ["data.sources.stanfordnlp/SHP.max_rows=5", "data.sources.own.path=own.jsonl"])
    assert tuple(config.data.sources) == (*SIX_SETS, "own")
    assert config.data.sources["stanfordnlp/SHP"].max_rows == 5
    assert config.data.sources["own"].path == "own.jsonl"


def test_sources_that_a_config_names_are_all_there_are(file: Path) -> None:
    file.write_text("data:\n  sources:\n    own: {path: own.jsonl}\n")
    config = load(file, ["data.sources.own.weight=2"])
    assert list(config.data.sources) == ["own"]
    assert config.data.sources["own"].weight == 2
    file.write_text("data: 3\n")
    with pytest.raises(ConfigError, match="data holds a value, not keys"):
        load(file, ["data.sources.own.weight=2"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ({}, "needs either a name"),
        ({"name": "a/b", "path": "c"}, "needs either a name"),
        ({"path": "c", "document_start": "("}, "document_start: is no regular expression"),
    ],
)
def test_unsupervised_text_that_is_none(text: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse({"data": {"unsupervised": text}})


def test_chunks_have_to_fit_the_model() -> None:
    text = {"path": "text.txt", "chunk_tokens": 4096}
    with pytest.raises(ConfigError, match=r"positions is 1024, but data\.unsupervised\.chunk_tokens is 4096"):
        parse({"data": {"unsupervised": text}, "models": {"policy": {}}})


def test_phases_are_three_or_four() -> None:
    assert parse({}).data.phases == (2, 4, 3, 1)
    assert parse({"data": {"phases": [2, 4, 4]}}).data.phases == (2, 4, 4)
    with pytest.raises(ConfigError, match=r"data\.phases: needs the shares of .*got 5"):
        parse({"data": {"phases": [1, 1, 1, 1, 1]}})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is decided by zero_stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is decided by precision"),
        ({"gradient_clipping": 2.0}, "gradient_clipping is decided by max_grad_norm"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer is decided by the optimizer section"),
    ],
)
def test_a_raw_deepspeed_key_that_the_config_decides_is_named(raw: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"ppo.critic_engine.deepspeed: {said}"):
        parse({"ppo": {"critic_engine": {"deepspeed": raw}}})


def test_a_weight_without_pairs_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.sources\.own: weight 2 is of pairs .* kind sft has none; leave it at 1"
    ):
        parse({"data": {"sources": {"own": {"path": "own.jsonl", "kind": "sft", "weight": 2}}}})


def test_a_secret_among_raw_deepspeed_keys_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"comet\.api_key is a secret, which a config must not hold") as refused:
        parse({"sft": {"engine": {"deepspeed": {"comet": {"enabled": False, "api_key": "a-canary"}}}}})
    assert "a-canary" not in str(refused.value)


def test_other_raw_deepspeed_keys_are_kept() -> None:
    raw = {"fp16": {"initial_scale_power": 12}, "zero_optimization": {"reduce_bucket_size": 10**7}}
    assert parse({"sft": {"engine": {"deepspeed": raw}}}).sft.engine.deepspeed == raw


def test_what_the_gold_model_does_not_set_is_as_in_the_reward_model() -> None:
    reward = {"epochs": 3, "optimizer": {"learning_rate": 0.5, "eps": 1e-6}, "engine": {"precision": "fp32"}}
    config = parse({"reward": reward, "gold": {"batch_size": 8, "optimizer": {"learning_rate": 0.25}}})
    assert (config.gold.epochs, config.gold.batch_size, config.gold.engine.precision) == (3, 8, "fp32")
    assert (config.gold.optimizer.learning_rate, config.gold.optimizer.eps) == (0.25, 1e-6)
    assert parse(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError) as error:
        parse({"reward": {"epochz": 3}})
    assert str(error.value).count("epochz") == 1


def test_a_learning_rate_leaves_the_other_settings_of_ppos_optimizers(file: Path) -> None:
    config = load(file, ["ppo.policy_optimizer.learning_rate=1e-3", "ppo.critic_optimizer.learning_rate=1e-3"])
    plain = load(file, []).ppo
    for network in ("policy_optimizer", "critic_optimizer"):
        found = getattr(config.ppo, network)
        assert (found.learning_rate, found.eps) == (1e-3, 1e-5)
        assert found.model_copy(update={"learning_rate": 0.1}) == getattr(plain, network).model_copy(
            update={"learning_rate": 0.1}
        )


def test_an_unknown_key_is_told_the_keys_of_its_own_place(file: Path) -> None:
    with pytest.raises(ConfigError) as found:
        load(file, ["evaluate.zzz=1"])
    known = "prompts, batch_size, sampling, precision, text_chunks, api_judge, samples"
    assert str(found.value) == f"evaluate.zzz: unknown key; known: {known}"
    with pytest.raises(ConfigError, match=r"^qqq: unknown key; known: name, workspace, .*promote$"):
        load(file, ["qqq=1"])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("kl_coef", "ppo.kl_coef"),
        ("ppo.missing_penalty", "missing_eos_penalty"),
        ("epoch", "sft.epochs or reward.epochs or gold.epochs or ppo.epochs"),
        (
            "learning_rat",
            "sft.optimizer.learning_rate or reward.optimizer.learning_rate or gold.optimizer.learning_rate or "
            "ppo.policy_optimizer.learning_rate or ppo.critic_optimizer.learning_rate",
        ),
        ("ppo.learning_rate", "policy_optimizer.learning_rate or critic_optimizer.learning_rate"),
        ("data.max_row", "sources.NAME.max_rows"),
    ],
)
def test_an_unknown_key_is_told_every_place_of_the_one_that_is_like_it(file: Path, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as found:
        load(file, [f"{key}=1"])
    assert str(found.value) == f"{key}: unknown key; did you mean {hint}?"


def test_probabilities_that_are_added_in_no_fixed_order_are_refused_where_order_counts() -> None:
    with pytest.raises(ConfigError, match=r"ppo.*deterministic: torch adds up the probabilities of top_p"):
        parse({"ppo": {"deterministic": True, "sampling": {"top_p": 0.9}}})
    assert parse({"ppo": {"deterministic": True}}).ppo.deterministic
