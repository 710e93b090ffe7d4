import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tasks import data_report, evaluation_report, page, report
from tasks.gates import GateResult
from tasks.stages import Stage, StageRef, run

EVIL = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"
EVALUATED = {
    "prompts": 20,
    "win_rate": 0.75,
    "win_rate_low": 0.56,
    "win_rate_high": 0.94,
    "length_controlled_win_rate": 0.7,
    "length_controlled_win_rate_low": 0.5,
    "length_controlled_win_rate_high": 0.9,
    "sft_reward": -0.5,
    "sft_reward_std": 1.0,
    "ppo_reward": 1.0,
    "ppo_reward_std": 0.8,
    "sft_true_score": 0.25,
    "sft_true_score_std": 0.25,
    "ppo_true_score": 0.75,
    "ppo_true_score_std": 0.125,
    "sft_tokens": 20.0,
    "ppo_tokens": 22.5,
    "sft_eos_rate": 0.5,
    "ppo_eos_rate": 1.0,
    "sft_kl": 0.0,
    "ppo_kl": 6.25,
}
REWARD = {
    "accuracy": 0.9,
    "accuracy_interval": 0.02,
    "length_accuracy": 0.55,
    "eval_pairs": 1234,
    "accuracy_per_source": {"Dahoas/rm-static": 0.875},
}


def answer(number: int, gain: float) -> dict:
    return {
        "prompt": f"prompt {number} {EVIL}",
        "source": EVIL,
        "sft": EVIL,
        "ppo": "",
        "sft_reward": 0.0,
        "ppo_reward": gain,
        "sft_tokens": 5,
        "ppo_tokens": 0,
        "sft_ended": True,
        "ppo_ended": False,
    }


@pytest.fixture
def refs(tmp_path) -> dict[str, StageRef]:
    def made(key: str, metrics: dict, inputs: dict[str, StageRef] | None = None, files: dict[str, str] | None = None):
        def work(directory: Path) -> dict:
            for name, text in (files or {}).items():
                (directory / name).write_text(text)
            (directory / "key.txt").write_text(key)
            return metrics

        return run(Stage(key.partition(":")[0], tmp_path, {"key": key}, inputs or {}, ()), work)

    clean = {"rows_in": 100, "kept": 90, "drops": {"too_long": 7, "tie": 3}}
    blend = {side: {"rows_in": 45, "kept": 40, "drops": {"leak": 4, "tie": 1}} for side in ("train", "test")}
    found = {f"clean:{name}": made(f"clean:{name}", {"total": clean}) for name in ("Dahoas/rm-static", "own")}
    found["blend"] = made("blend", {"sources": dict.fromkeys(("Dahoas/rm-static", "own"), blend), "train": 80})
    found["tokenise"] = made("tokenise", {"sft": {"train": {"kept": 1500}, "eval": {"kept": 75}}})
    curve = "".join(json.dumps({"step": n, "sft/loss": 1 / n}) + "\n" for n in range(1, 5))
    found["sft"] = made("sft", {"loss": 1.0}, {"data": found["tokenise"]}, {"records/metrics.jsonl": curve})
    found["reward"] = made("reward", REWARD)
    rows = "".join(json.dumps(answer(n, (n - 10) / 10)) + "\n" for n in range(20))
    found["evaluate"] = made("evaluate", EVALUATED, {"reward": found["reward"]}, {"answers.jsonl": rows})
    return found


@pytest.fixture
def summary(refs) -> report.RunSummary:
    return report.RunSummary(
        name="demo",
        flow_run="amber-otter",
        verdict=f"demo-policy version 1 becomes champion. {EVIL}",
        promoted=True,
        rows=[
            report.StepRow("sft", 75.2, False, "loss 1.00"),
            report.StepRow("reward", 5.04, True, f"accuracy {EVIL}"),
        ],
        refs=refs,
        config=f"name: demo  # {EVIL}",
        versions={"demo-policy": "1 (candidate, champion)"},
        run_id="abc",
        memory={"ppo": "31.0 GiB measured, 30.0 predicted (-3%)"},
    )


class Page(HTMLParser):
    """Tags, addresses and text of a page, as a browser takes them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += f"{data} "


def test_nothing_that_was_generated_becomes_markup(summary):
    html = report.render(summary)
    shown = Page(html)
    assert "script" not in shown.tags
    assert "<script" not in html
    assert shown.text.count(EVIL) >= 4 + 2 * 8
    assert "49" not in re.sub(
        re.escape("{{ 7 * 7 }}"), "", shown.text.split("Answers side by side")[1].split("Data")[0]
    )


def test_a_measured_peak_stands_beside_its_prediction(summary):
    assert "31.0 GiB measured, 30.0 predicted (-3%)" in Page(report.render(summary)).text
    assert "Peak memory" not in Page(report.render(replace(summary, memory={}))).text


def test_page_needs_nothing_else(summary):
    html = Page(report.render(summary))
    assert len(html.addresses) == 1
    assert html.addresses[0].startswith("data:image/png;base64,iVBOR")
    assert not {"link", "iframe", "object"} & set(html.tags)
    style = (page.TEMPLATES / "style.css").read_text()
    assert "@import" not in style
    assert "url(" not in style


def test_figures_of_the_run_are_there(summary):
    text = " ".join(Page(report.render(summary)).text.split())
    for expected in (
        "New champion",
        "75.0 % 56.0 to 94.0, 20 held-out prompts",
        "PPO against SFT By the reward model 75.0 % [56.0, 94.0] At equal length 70.0 % [50.0, 90.0] Prompts 20",
        "No gold reward model judged: data.phases has no share for the judge",
        "+1.50 std -0.50 → 1.00",
        "+2.00 std 0.25 → 0.75",
        "90.0 % length alone: 55.0 %",
        "Reward, mean ± std -0.500 ± 1.000 1.000 ± 0.800 +1.500",
        "KL to the SFT model, nats per answer 0.00 6.25 +6.25",
        "Answers that end by themselves 50.0 % 100.0 % +50.0 points",
        "Reward model, 1,234 held-out pairs 90.0 % ± 2.0",
        "Reward model on Dahoas/rm-static 87.5 %",
        "SFT 1,500 75",
        "sft 1 min 15 s loss 1.00",
        "reward 5.0 s cached",
        "demo-policy version 1 (candidate, champion)",
        "1 min 15 s of work in this run",
    ):
        assert expected in text, expected


def test_the_gold_reward_model_stands_beside_the_other_and_hacking_is_said(summary, refs, tmp_path):
    gold = {
        "gold_win_rate": 0.5,
        "gold_win_rate_low": 0.25,
        "gold_win_rate_high": 0.75,
        "gold_length_controlled_win_rate": 0.4,
        "gold_length_controlled_win_rate_low": 0.2,
        "gold_length_controlled_win_rate_high": 0.6,
        "win_rate_gap": 0.25,
        "win_rate_gap_low": 0.05,
        "win_rate_gap_high": 0.45,
        "gain": 1.5,
        "gold_gain": 0.25,
        "gain_gap": 1.25,
        "sft_gold": 0.0,
        "ppo_gold": 0.5,
        "per_source": {"own": {"prompts": 20, "win_rate": 0.75, "win_rate_low": 0.5, "win_rate_high": 1.0}},
    }
    evaluated = replace(refs["evaluate"], metrics=EVALUATED | gold)
    judge = replace(refs["reward"], stage="gold", metrics=REWARD | {"accuracy": 0.8})
    page_ = Page(report.render(replace(summary, refs=refs | {"evaluate": evaluated, "gold": judge})))
    text = " ".join(page_.text.split())
    for expected in (
        "The same by the gold reward model 50.0 % 25.0 to 75.0",
        "By the gold reward model 50.0 % [25.0, 75.0] Gap +25.0 [+5.0, +45.0] At equal length 70.0 % [50.0, 90.0]",
        "Gold, at equal length 40.0 % [20.0, 60.0] Prompts 20",
        "PPO gained +1.50 and +0.25 standard deviations of SFT's answers by the reward model and by the gold one",
        "a part of what it gained is the reward model's errors",
        "PPO against SFT own 75.0 % [50.0, 100.0] 20",
        "Gold reward, mean ± std 0.000 0.500 +0.500",
        "Gold reward model, 1,234 held-out pairs 80.0 %",
    ):
        assert expected in text, expected
    assert "No gold reward model judged" not in text
    unsure = EVALUATED | gold | {"win_rate_gap_low": -0.01}
    assert "errors" not in evaluation_report.hacking(unsure)


def test_gates_are_shown_with_what_was_wanted_and_measured(summary):
    passed = GateResult("kl", "KL to the SFT model", "<= 15", True, 4.0, 3.5, 4.5, {})
    failed = GateResult("tokens", "tokens per answer", "<= sft + 5", False, 30.0, 28.0, 32.0, {"sft": 20.0})
    text = " ".join(Page(report.render(replace(summary, gates=[passed, failed]))).text.split())
    assert "KL to the SFT model <= 15 4 [3.5, 4.5] passed" in text
    assert "tokens per answer <= sft + 5 30 [28, 32], sft 20 failed" in text
    assert "Gates" not in Page(report.render(summary)).text


def test_verdict_that_changes_nothing_says_so(summary):
    text = Page(report.render(replace(summary, promoted=False))).text
    assert "Champion unchanged" in text
    assert "New champion" not in text


def test_lineage_names_every_stage_and_what_it_reads(refs):
    lines = {line["key"]: line for line in report.lineage(refs)}
    assert list(lines) == list(refs)
    assert lines["sft"]["inputs"] == "tokenise"
    assert lines["evaluate"]["inputs"] == "reward"
    assert lines["sft"]["fingerprint"] == refs["sft"].fingerprint
    assert lines["sft"]["digest"] == refs["sft"].digest[:16]


def test_data_table_adds_cleaning_and_blending_up(refs):
    own, total = data_report.data_table(refs)[1:]
    assert (own["name"], own["rows_in"], own["kept"]) == ("own", 100, 80)
    assert own["counts"] == {"leak": 8, "too_long": 7, "tie": 5}
    assert own["rows_in"] - own["kept"] == sum(own["counts"].values())
    assert (total["rows_in"], total["kept"], total["is_total"]) == (200, 160, True)


def test_samples_are_spread_from_the_worst_loss_to_the_best_win(refs):
    folder = refs["evaluate"].directory
    shown = evaluation_report.samples(folder, 3)
    assert [sample["prompt"].split()[1] for sample in shown] == ["0", "10", "19"]
    assert [sample["winner"] for sample in shown] == ["sft", "tie", "ppo"]
    assert len(evaluation_report.samples(folder, 100)) == 20
    assert evaluation_report.samples(folder.with_name("none"), 3) == []


def test_report_of_a_run_that_ended_early_has_what_there_is(summary, refs):
    early = replace(summary, refs={"sft": refs["sft"]}, versions={}, run_id=None)
    text = Page(report.render(early)).text
    assert "Curves" in text
    assert "Win rates" not in text
    assert "Answers: PPO beside SFT" not in text
    assert "Reward model's accuracy" not in text
    assert "Steps" in Page(report.render(replace(early, refs={}, rows=[]))).text


def test_report_is_written_whole_with_its_folder(summary, tmp_path):
    path = report.write(tmp_path / "reports" / "amber-otter.html", summary)
    assert path.read_text().endswith("</html>\n")
    assert [file.name for file in path.parent.iterdir()] == ["amber-otter.html"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (7800, "2 h 10 min")]
)
def test_duration_reads_as_people_say_it(seconds, text):
    assert page.duration(seconds) == text


def test_answers_are_described_source_by_source_for_ppo_and_the_moving_average(refs):
    own = {"prompts": 3, "win_rate": 0.5, "win_rate_low": 0.25, "win_rate_high": 0.75}
    of_ppo = {"per_source": {"own": own | {"ppo_kl": 6.25, "ppo_eos_rate": 0.5}}}
    of_average = {"ema_per_source": {"own": own | {"ema_kl": 2.0, "ema_eos_rate": 1.0}}}
    found = {**refs, "evaluate": replace(refs["evaluate"], metrics=EVALUATED | of_ppo | of_average)}
    found["compare"] = replace(refs["evaluate"], stage="compare", metrics=of_ppo)
    kl, ended = "KL to the SFT model, nats per answer", "Answers that end by themselves"
    assert evaluation_report.answers_per_source(found) == [
        {"answers of": "PPO", "source": "own", kl: "6.25", ended: "50.0 %"},
        {"answers of": "Moving average", "source": "own", kl: "2.00", ended: "100.0 %"},
    ]
    assert [line["contest"] for line in evaluation_report.per_source(found)] == [
        "PPO against SFT",
        "Moving average against PPO",
        "Candidate against the champion",
    ]
