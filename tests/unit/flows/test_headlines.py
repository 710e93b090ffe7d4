from pathlib import Path
from typing import Any

from tasks.headlines import HEADLINES, headline, rows
from tasks.stages import StageRef


def ref(stage: str, metrics: dict[str, Any], cached: bool = False, seconds: float = 2.0) -> StageRef:
    return StageRef(stage, "f", "d", str(Path("/nowhere")), cached, seconds, metrics)


def test_main_figures() -> None:
    phase = {"train": {"rows": 1200, "groups": 7}, "eval": {"rows": 3, "groups": 1}}
    assert headline("split", {"ppo": phase, "sft": phase}) == "sft 1,200, ppo 1,200 train pairs"
    assert headline("ppo", {"first_reward": -0.5, "reward": 1.25, "kl": 3.456}) == "reward -0.50 → +1.25, KL 3.46"
    assert headline("evaluate", {"win_rate": 0.625}) == "PPO wins 62.5 % against SFT"
    both = {"win_rate": 0.625, "gold_win_rate": 0.5}
    assert headline("compare", both) == "the candidate wins 62.5 % against the champion, gold 50.0 %"
    assert headline("base", {"vocabulary": 512}) == "vocabulary 512"
    tokens = {"sft": {"train": {"tokens": {"prompt": {"sum": 10}, "answer": {"sum": 1000}}}}}
    assert headline("tokenise", tokens) == "1,010 tokens"
    assert headline("register", {}) == ""


def test_stages_of_one_name_share_a_line() -> None:
    cleaned = {"total": {"kept": 1000, "rows_in": 1500}}
    refs = [
        ref("clean", cleaned, seconds=2),
        ref("clean", cleaned, cached=True, seconds=9),
        ref("sft", {"perplexity": 3}),
    ]
    clean, sft = rows(refs)
    assert (clean.step, clean.seconds, clean.cached) == ("clean × 2", 2, False)
    assert clean.metric == "2,000 of 3,000 pairs kept"
    assert (sft.step, sft.metric) == ("sft", "perplexity 3.00")


def test_a_line_is_cached_only_if_all_of_it_is() -> None:
    downloads = [ref("download", {"rows": {"train": 5, "test": 2}}, cached=True) for _ in range(2)]
    (line,) = rows(downloads)
    assert (line.cached, line.seconds, line.metric) == (True, 4.0, "14 rows of 2 sets")


def test_gpu_hours_are_the_time_on_every_gpu() -> None:
    reward, sft = rows(
        [
            ref("reward", {"accuracy": 0.9, "gpus": 2}, cached=True, seconds=1800),
            ref("sft", {"perplexity": 3}, seconds=36),
        ]
    )
    assert (reward.gpu_hours, sft.gpu_hours) == (1.0, 0.0)


def test_every_launched_stage_has_a_figure() -> None:
    assert {"base", "sft", "reward", "ppo", "evaluate", "compare"} <= set(HEADLINES)
