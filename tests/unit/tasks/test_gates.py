import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import gates, sentences
from tasks.config import ConfigError, GatesConfig, parse
from tasks.gates import Evidence
from tasks.paired import estimate
from tasks.sentences import Comparison, Gate


def answer(ppo: float, sft: float, **more: float) -> dict:
    return {"ppo_reward": ppo, "sft_reward": sft, "ppo_kl": 4.0, "ppo_ended": True, "sft_ended": True, **more}


def evidence(compared: list[dict] | None = None) -> Evidence:
    """PPO wins 6 of 10 prompts, ties 2 and loses 2 against SFT."""
    rows = [answer(1.0, 0.0)] * 6 + [answer(0.5, 0.5)] * 2 + [answer(0.0, 1.0)] * 2
    reward = {"accuracy": 0.7, "accuracy_interval": 0.04, "length_accuracy": 0.6, "length_gain_interval": 0.05}
    return Evidence(rows, compared, reward)


@pytest.mark.parametrize(
    ("name", "sentence", "gate"),
    [
        ("kl", "<= 15", Gate(Comparison("<=", None, 15.0), None)),
        ("reward", "> -0.5", Gate(Comparison(">", None, -0.5), None)),
        ("reward_accuracy", ">= length_baseline + 0.03", Gate(Comparison(">=", "length_baseline", 0.03), None)),
        ("tokens", "<sft-2", Gate(Comparison("<", "sft", -2.0), None)),
        (
            "win_rate_vs_champion",
            ">= 0.52 (lower bound >= 0.5)",
            Gate(Comparison(">=", None, 0.52), ("lower", Comparison(">=", None, 0.5))),
        ),
        (
            "eos_rate",
            ">= sft (upper bound < 1)",
            Gate(Comparison(">=", "sft", 0.0), ("upper", Comparison("<", None, 1))),
        ),
    ],
)
def test_sentences_are_read_as_they_are_written(name, sentence, gate):
    assert sentences.parse(name, sentence) == gate


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "15",
        "= 15",
        "=> 15",
        "<= fifteen + ",
        "<= 1.",
        "<= 15 nats",
        ">= 0.5 (lower >= 0.4)",
        ">= 0.5 lower bound > 0",
    ],
)
def test_what_is_no_sentence_is_refused_with_an_example(sentence):
    with pytest.raises(ValueError, match=r'is no gate; write a comparison such as ">= 0.52"'):
        sentences.parse("kl", sentence)


def test_config_says_which_gate_is_wrong_and_how_to_mend_it():
    with pytest.raises(ConfigError, match=r'promote.gates.kl: "~ 3" is no gate; write a comparison'):
        parse({"promote": {"gates": {"kl": "~ 3"}}})
    with pytest.raises(ConfigError, match=r"names the baseline lenght; it may be length_baseline"):
        parse({"promote": {"gates": {"reward_accuracy": ">= lenght + 0.03"}}})
    with pytest.raises(ConfigError, match=r"names the baseline sft; this measure has none, so give a number"):
        parse({"promote": {"gates": {"kl": "<= sft"}}})
    with pytest.raises(ConfigError, match=r"promote.gates.kll: unknown key; did you mean kl\?"):
        parse({"promote": {"gates": {"kll": "<= 3"}}})


def test_a_gate_that_is_set_leaves_the_others_and_null_takes_one_away():
    config = parse({"promote": {"gates": {"kl": "<= 15"}}}).promote.gates
    assert list(config.sentences) == ["win_rate_vs_champion", "kl"]
    assert parse({"promote": {"gates": {"win_rate_vs_champion": None}}}).promote.gates.sentences == {}


def test_every_measure_has_a_field_in_the_config_and_every_default_is_a_gate():
    assert set(GatesConfig.model_fields) == set(sentences.MEASURES) == set(gates.HOW)
    for name, sentence in GatesConfig().sentences.items():
        sentences.parse(name, sentence)


def test_win_rate_counts_ties_half_and_names_its_rival():
    (first,) = gates.check({"win_rate_vs_champion": ">= 0.7"}, evidence())
    assert (first.value, first.passed) == (0.7, True)
    assert first.title == "win rate against the SFT model"
    rows = [{"ppo_reward": 0.0, "champion_reward": 1.0}] * 3 + [{"ppo_reward": 2.0, "champion_reward": 1.0}]
    (later,) = gates.check({"win_rate_vs_champion": ">= 0.7"}, evidence(rows))
    assert (later.value, later.passed) == (0.25, False)
    assert later.title == "win rate against the champion"
    assert later.verdict.startswith("failed: win rate against the champion 0.25 [")


def test_bound_is_checked_beside_the_value():
    won = {"win_rate_vs_sft": ">= 0.6 (lower bound >= 0.5)"}
    (few,) = gates.check(won, evidence())
    many = Evidence([row for row in evidence().answers for _ in range(40)], None, {})
    (sure,) = gates.check(won, many)
    assert few.value == sure.value == 0.7
    assert few.lower < 0.5 < sure.lower
    assert (few.passed, sure.passed) == (False, True)


def scored(proxy: tuple[float, float], gold: tuple[float, float], count: int = 1) -> list[dict]:
    """Answers of PPO and SFT, with their scores by the reward model and by the gold one."""
    row = {"ppo_reward": proxy[0], "sft_reward": proxy[1], "ppo_gold": gold[0], "sft_gold": gold[1]}
    return [row | {"ppo": "words " * 3, "sft": "words"}] * count


def judged(prefer_gold: bool, accuracy_low: float) -> Evidence:
    """PPO wins 9 of 10 by the reward model, 6 of 10 by the gold one."""
    rows = [*scored((1, 0), (1, 0), 6), *scored((1, 0), (0, 1), 3), *scored((0, 1), (0, 1), 1)]
    gold = {"accuracy": 0.55, "accuracy_low": accuracy_low}
    return Evidence(rows, None, {}, gold, prefer_gold=prefer_gold)


@pytest.mark.parametrize(
    ("prefer_gold", "accuracy_low", "rate", "title"),
    [
        (True, 0.51, 0.6, "win rate against the SFT model by the gold reward model"),
        (
            True,
            0.5,
            0.9,
            "win rate against the SFT model by the run's reward model (the gold one, right in 55 % of held-out pairs, "
            "may be no better than chance)",
        ),
        (False, 0.51, 0.9, "win rate against the SFT model by the run's reward model"),
    ],
)
def test_the_gold_reward_model_judges_where_it_can(prefer_gold, accuracy_low, rate, title):
    for name in ("win_rate_vs_champion", "win_rate_vs_sft"):
        (result,) = gates.check({name: ">= 0.7"}, judged(prefer_gold, accuracy_low))
        assert (result.value, result.title, result.passed) == (pytest.approx(rate), title, rate >= 0.7)


def test_hacking_is_a_gap_and_the_proxy_can_be_asked_beside():
    named = {"proxy_win_rate_vs_champion": ">= 0.8", "win_rate_gap": "<= 0.2", "gold_reward": ">= sft"}
    proxy, gap, reward = gates.check(named, judged(True, 0.6))
    assert (proxy.value, proxy.passed) == (pytest.approx(0.9), True)
    assert (gap.value, gap.passed) == (pytest.approx(0.3), False)
    assert gap.lower < 0.3 < gap.upper
    assert (reward.value, reward.baselines) == (pytest.approx(0.6), {"sft": pytest.approx(0.4)})


def test_text_is_measured_chunk_by_chunk_and_repetition_answer_by_answer():
    rows = [answer(1.0, 0.0, ppo_repetition=0.5, sft_repetition=0.25)] * 3
    texts = [{"ppo_loss": level + 0.25, "sft_loss": level} for level in (1.0, 2.0, 6.0)]
    named = {"text_loss": "<= sft + 0.3 (upper bound <= sft + 0.3)", "repetition": "<= sft + 0.2"}
    text, repetition = gates.check(named, Evidence(rows, None, {}, texts=texts))
    assert (text.value, text.passed) == (pytest.approx(3.25), True)
    assert text.baselines == {"sft": pytest.approx(3.0)}
    assert (repetition.value, repetition.passed) == (0.5, False)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"data": {"phases": [2, 4, 4]}, "promote": {"gates": {"win_rate_gap": "<= 0.1"}}},
            "win_rate_gap needs a gold",
        ),
        (
            {"promote": {"gates": {"text_loss": "<= sft"}}},
            "text_loss needs unsupervised text; name some as data.unsupervised",
        ),
    ],
)
def test_a_gate_about_what_the_run_has_not_is_refused(tree, sentence):
    with pytest.raises(ConfigError, match=f"promote.gates.{sentence}"):
        parse(tree)


def test_accuracy_stands_against_length_and_its_paired_interval():
    (passed,) = gates.check({"reward_accuracy": ">= length_baseline + 0.03"}, evidence())
    assert passed.passed
    assert passed.baselines == {"length_baseline": pytest.approx(0.6)}
    assert passed.measured == "0.7 [0.66, 0.74], length_baseline 0.6"
    bound = ">= length_baseline + 0.03 (lower bound >= length_baseline + 0.06)"
    (failed,) = gates.check({"reward_accuracy": bound}, evidence())
    assert not failed.passed  # 0.7 - 0.6 - 0.05 is less than 0.06


def test_a_baseline_is_taken_off_prompt_by_prompt():
    # Rewards spread widely over the prompts, the gain is the same everywhere: only pairs can tell that it is sure.
    rows = [answer(level + 0.1, level) for level in range(-50, 50)]
    (gain,) = gates.check({"reward": ">= sft + 0.05 (lower bound >= sft + 0.05)"}, Evidence(rows, None, {}))
    assert gain.passed
    assert gain.lower < -1  # of the reward itself
    assert gain.baselines == {"sft": pytest.approx(-0.5)}


def test_interval_is_that_of_the_normal_approximation_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = estimate(values)
    reach = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.lower == pytest.approx(values.mean() - reach, abs=0.05 * reach)
    assert found.upper == pytest.approx(values.mean() + reach, abs=0.05 * reach)
    assert estimate(values) == found


@given(st.sampled_from(sorted(gates.OPERATORS)), st.decimals(-1000, 1000, places=3), st.sampled_from(["", " "]))
def test_any_number_is_read_back(sign, number, space):
    assert sentences.parse("kl", f"{sign}{space}{number}").value == Comparison(sign, None, float(number))


def test_the_champion_is_held_to_the_gates_that_are_measured_of_it():
    def told(prompt: str, tokens: int, sft: float) -> dict:
        return {**answer(1.0, sft), "prompt": prompt, "ppo": "mine", "ppo_tokens": tokens, "sft_tokens": 10}

    def beside(prompt: str, reward: float, tokens: int) -> dict:
        champion = {"champion": "its", "champion_reward": reward, "champion_tokens": tokens, "champion_ended": True}
        return {"prompt": prompt, "ppo": "mine", "ppo_reward": 1.0, "ppo_tokens": 12, **champion}

    # Of four prompts the champion may be asked three: it beats SFT on one and loses two, at 20 tokens each.
    rows = [told("a", 12, 0.0), told("left out", 12, 9.0), told("b", 12, 0.6), told("c", 12, 0.6)]
    compared = [beside("a", 0.5, 20), beside("b", 0.5, 20), beside("c", 0.5, 20)]
    wanted = {
        "win_rate_vs_sft": ">= 0.5",
        "tokens": "<= sft + 10",
        "kl": "<= 0",  # not measured of it
    }
    found = gates.check_champion(wanted, Evidence(rows, compared, {}))
    assert [(gate.name, gate.passed) for gate in found] == [("win_rate_vs_sft", False), ("tokens", True)]
    assert found[0].value == pytest.approx(1 / 3)
    assert (found[1].value, found[1].baselines) == (20.0, {"sft": 10.0})
    assert gates.check_champion(wanted, Evidence(rows, None, {})) == []
