"""The judge behind an API, asked over HTTP: a server on this machine answers as such APIs do, and fails as they do."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import api_judge, gates, train
from tasks.api_judge import judge
from tasks.config import ApiJudgeConfig, ConfigError, parse
from tasks.json_lines import write_rows
from tests.judge import KEY, Answer, Server, answers_in, longer

ROWS = [
    {"prompt": "why?", "source": "left", "ppo": "because of this", "sft": "so"},
    {"prompt": "how?", "source": "left", "ppo": "so", "sft": "as one does it"},
    {"prompt": "when?", "source": "right", "ppo": "now", "sft": "yes"},
    {"prompt": "who?", "source": "right", "ppo": "the one there", "sft": "me"},
]


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[..., Answer]], Server]]:
    running: list[Server] = []

    def start(replies: Callable[..., Answer]) -> Server:
        running.append(Server(replies))
        return running[-1]

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def config(server: Server, **changes: Any) -> ApiJudgeConfig:
    fast = {"calls_per_minute": 1e6, "key_variable": "JUDGE_KEY", "retries": 2, "timeout_seconds": 10}
    return ApiJudgeConfig(base_url=server.address, model="m", **{**fast, **changes})


def test_both_orders_are_asked_and_a_tie_is_half(serve: Any, tmp_path: Path) -> None:
    server = serve(longer)
    found = judge(config(server, prices=(2.0, 100.0)), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    assert found["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert (found["prompts"], found["calls"], found["orders_agree"], found["capped"]) == (4, 8, 1.0, False)
    assert found["cost"] == pytest.approx(8 * (1000 * 2 + 10 * 100) / 1e6)
    rates = {name: (of["prompts"], of["win_rate"]) for name, of in found["per_source"].items()}
    assert rates == {"left": (2, 0.5), "right": (2, 0.75)}
    asked = [answers_in(request) for request in server.requests[:2]]
    assert asked == [("because of this", "so"), ("so", "because of this")]
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    sent = {(request["model"], request["temperature"], request["max_tokens"]) for request in server.requests}
    assert sent == {("m", 0, 512)}
    assert gates.answers(tmp_path, api_judge.VERDICTS)[0]["verdicts"] == ["A", "B"]


@pytest.mark.parametrize(("wanted", "rival", "files"), [(True, "sft", 2), (False, "sft", 1), (True, "champion", 1)])
def test_the_moving_average_is_judged_where_the_config_asks_for_it(
    serve: Any, tmp_path: Path, wanted: bool, rival: str, files: int
) -> None:
    (tmp_path / "answers").mkdir()
    write_rows(tmp_path / "answers" / "answers.jsonl", [{**row, "ema": "x", "champion": row["sft"]} for row in ROWS])
    evaluate = SimpleNamespace(api_judge=config(serve(longer), ema=wanted))
    stage = SimpleNamespace(inputs={"evaluate": SimpleNamespace(directory=tmp_path / "answers")})
    found = train._asked(SimpleNamespace(config=SimpleNamespace(evaluate=evaluate)), rival)(stage, tmp_path)
    assert found["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert found.get("ema_win_rate") == (0.0 if files == 2 else None)  # x is shorter than each of PPO's answers
    assert len(list(tmp_path.glob("*.jsonl"))) == files


def test_a_judge_that_likes_what_it_reads_first_decides_nothing(serve: Any, tmp_path: Path) -> None:
    found = judge(config(serve(lambda *_: (200, "[[A]]"))), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    assert (found["win_rate"], found["orders_agree"]) == (0.5, 0.0)


def test_a_busy_and_a_broken_server_are_asked_again_and_a_reply_without_verdict_leaves_its_pair_out(
    serve: Any, tmp_path: Path
) -> None:
    def replies(first: str, second: str, number: int) -> Answer:
        return {1: (429, "slow down"), 3: (500, "broken"), 6: (200, "I cannot say.")}.get(
            number, longer(first, second, number)
        )

    found = judge(config(serve(replies)), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    # Requests 1 to 4 are the first pair's, 6 is the second's other order.
    assert (found["calls"], found["no_verdict"], found["failed"], found["prompts"]) == (10, 1, 0, 3)
    assert found["win_rate"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_calls_and_cost_are_capped(serve: Any, tmp_path: Path) -> None:
    server = serve(longer)
    (tmp_path / "calls").mkdir()
    found = judge(config(server, max_calls=5), ROWS, "ppo", "sft", tmp_path / "calls" / api_judge.VERDICTS)
    assert (found["prompts"], found["capped"], len(server.requests)) == (2, True, 5)
    (tmp_path / "cost").mkdir()
    dear = config(server, max_cost=0.0035, prices=(1.0, 0.0))  # a thousandth a call
    found = judge(dear, ROWS, "ppo", "sft", tmp_path / "cost" / api_judge.VERDICTS)
    assert (found["prompts"], found["capped"], len(server.requests)) == (2, True, 5 + 4)


def test_retries_count_towards_the_cap(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda *_: (500, "broken"))
    found = judge(config(server, max_calls=4, retries=9), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    assert (len(server.requests), found["prompts"], found["capped"]) == (4, 0, True)
    assert "win_rate" not in found


def test_an_api_that_is_down_keeps_what_was_said_and_the_next_run_goes_on(serve: Any, tmp_path: Path) -> None:
    down = True
    server = serve(lambda a, b, number: (503, "down") if down and number > 4 else longer(a, b, number))
    with pytest.raises(ConnectionError, match="answers with status 503, also when asked again; the verdicts so far"):
        judge(config(server, retries=0), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    kept = gates.answers(tmp_path, api_judge.VERDICTS)
    assert [row["won"] for row in kept] == [1.0, 0.0, None]
    with (tmp_path / api_judge.VERDICTS).open("a") as file:
        file.write('{"won": 1.0, "ver')  # a kill while it was written
    down, before = False, len(server.requests)
    found = judge(config(server, retries=0), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
    assert len(server.requests) == before + 2
    assert (found["prompts"], found["failed"]) == (3, 2)
    assert found["win_rate"] == pytest.approx(2 / 3)


def test_what_was_paid_for_lies_there_while_a_line_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / api_judge.VERDICTS
    write_rows(path, [{"won": 1.0}, {"won": None}])
    whole = path.read_text()
    written = path.stat().st_mtime_ns
    assert len(api_judge.read_verdicts(path)) == 2
    assert path.stat().st_mtime_ns == written, "nothing to take out, nothing written"
    path.write_text(cut := f'{whole}{{"won": 1.0, "ver')
    with path.open() as file:
        assert len(api_judge.read_verdicts(path)) == 2
        assert file.read() == cut, "it was written over, which a kill would cut short"
    assert path.read_text() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_the_key_is_in_the_header_and_nowhere_else(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve(longer)
    with caplog.at_level(logging.DEBUG):
        judge(config(server), ROWS, "ppo", "sft", tmp_path / api_judge.VERDICTS)
        (tmp_path / "refused").mkdir()
        refusing = serve(lambda *_: (401, "Incorrect API key provided:"))
        with pytest.raises(ConfigError) as refused:
            judge(config(refusing), ROWS, "ppo", "sft", tmp_path / "refused" / api_judge.VERDICTS)
    assert {request["key"] for request in server.requests} == {f"Bearer {KEY}"}
    assert "refused the request with status 401; check the model m and the key in JUDGE_KEY" in str(refused.value)
    written = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    out, err = capfd.readouterr()
    assert KEY not in str(refused.value) + caplog.text + out + err + written + config(server).model_dump_json()


def test_requests_keep_their_pace(serve: Any, tmp_path: Path) -> None:
    server = serve(longer)
    judge(config(server, calls_per_minute=1200), ROWS[:2], "ppo", "sft", tmp_path / api_judge.VERDICTS)
    assert server.times[-1] - server.times[0] >= 3 * 0.05 - 0.02


def test_what_is_missing_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    settings = {"model": "m", "base_url": "http://127.0.0.1:1/v1", "key_variable": "JUDGE_KEY"}
    with pytest.raises(ConfigError, match="the environment variable JUDGE_KEY holds no key for http://127"):
        api_judge.check(ApiJudgeConfig(**settings))
    api_judge.check(ApiJudgeConfig(**settings | {"key_variable": None}))
    for changes, sentence in (({"max_cost": 3.0}, "max_cost needs prices"),):
        with pytest.raises(ConfigError, match=sentence):
            parse({"evaluate": {"api_judge": {"model": "m", **changes}}})
    with pytest.raises(ConfigError, match=r"api_win_rate_vs_champion needs evaluate\.api_judge"):
        parse({"promote": {"gates": {"api_win_rate_vs_champion": ">= 0.5"}}})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_url": "https://host/v1?api_key=sk-9f3a"}, "base_url: leave out what follows"),
        ({"base_url": "https://host/v1#sk-9f3a"}, "base_url: leave out what follows"),
        ({"base_url": "https://user:sk-9f3a@host/v1"}, "base_url: leave out the password"),
        ({"key_variable": "sk-9f3a"}, "key_variable: name the environment variable"),
        ({"key_variable": ["sk-9f3a"]}, "key_variable: name the environment variable"),
        ({"key_variable": "", "api_key": "sk-9f3a"}, "key_variable: name the environment variable"),
    ],
)
def test_a_key_in_the_config_is_refused_and_not_repeated(changes: dict[str, object], sentence: str) -> None:
    settings = {"model": "m", **changes}
    with pytest.raises(ConfigError, match=rf"evaluate\.api_judge\.{sentence}") as refused:
        parse({"evaluate": {"api_judge": settings}})
    with pytest.raises(ValidationError) as by_itself:
        ApiJudgeConfig(**settings)
    assert "9f3a" not in str(refused.value) + str(by_itself.value)


def test_the_gate_reads_the_verdicts() -> None:
    verdicts = [{"won": 1.0}, {"won": None}, {"won": 0.5}]
    named = {"api_win_rate_vs_champion": ">= 0.7 (lower bound >= 0.5)"}
    (result,) = gates.check(named, gates.Evidence([], None, {}, verdicts=verdicts))
    assert (result.value, result.lower, result.passed) == (0.75, 0.5, True)
    (unknown,) = gates.check(named, gates.Evidence([], None, {}, verdicts=[]))
    assert not unknown.passed
