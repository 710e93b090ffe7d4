import sqlite3
import threading

import pytest

from tasks import events, gates, history, tracking
from tasks.config import parse
from tasks.promote import (
    Consent,
    Judgement,
    decide,
    judge,
    look,
    needs_comparison,
    promote,
    resolve,
    roll_back,
    settled,
    terms,
)
from tasks.registered import companions
from tasks.stages import StageRef
from tasks.tracking import Version


def version(number: int, digest: str = "", name: str = "chat-policy") -> Version:
    return Version(name, number, (), {"digest": digest or f"digest {number}"}, "file:///x", None, 0.0)


def gate(passed: bool, name: str = "kl") -> gates.GateResult:
    return gates.GateResult(name, "KL", "<= 15", passed, 4.0 if passed else 16.0, 3.0, 17.0, {})


def judgement(passed: bool, champion: int | None) -> Judgement:
    return Judgement([gate(passed)], champion)


def test_champion_moves_only_if_every_gate_is_passed():
    assert decide(version(2), [gate(True), gate(True)]).promoted
    assert not decide(version(2), [gate(True), gate(False)]).promoted
    assert decide(version(2), []).promoted


def test_reason_names_version_gate_measure_and_limit():
    assert decide(version(1), [gate(True)]).reason == (
        "chat-policy version 1 becomes champion, it passes its gates: KL 4 [3, 17], wanted <= 15."
    )
    assert decide(version(3), [gate(True), gate(False)]).reason == (
        "chat-policy version 3 stays a candidate, it misses a gate: KL 16 [3, 17], wanted <= 15."
    )


def test_champion_itself_is_left_as_it_is_even_under_another_number():
    for candidate, champion in ((version(2), version(2)), (version(3, "same"), version(2, "same"))):
        verdict = judge(candidate, champion, judgement(True, 2))
        assert not verdict.promoted
        assert "is the champion already" in verdict.reason
        assert not needs_comparison(candidate, champion)


def test_comparison_is_needed_against_another_champion_only():
    assert needs_comparison(version(2), version(1))
    assert not needs_comparison(version(1), None)


@pytest.mark.parametrize(("compared_with", "present"), [(None, 1), (1, None), (1, 2)])
def test_verdict_on_a_champion_that_is_gone_is_not_given(compared_with, present):
    champion = version(present) if present else None
    verdict = judge(version(9), champion, judgement(True, compared_with))
    assert not verdict.promoted
    assert "the champion changed" in verdict.reason
    assert judge(version(9), champion, judgement(True, present)).promoted


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("workspace"))


def registered(store, tmp_path, name: str, count: int) -> None:
    """Versions 1 to count of a policy, version n trained on version n of its reward model."""
    for number in range(1, count + 1):
        tracking.register_version(store, f"{name}-reward", tmp_path, None, {"digest": f"r{number}"})
        tags = {"digest": f"p{number}", "input.reward.digest": f"r{number}"}
        tracking.register_version(store, f"{name}-policy", tmp_path, None, tags)


def champions(store, name: str) -> list[int | None]:
    found = (tracking.alias(store, f"{name}-{part}", "champion") for part in ("policy", "reward"))
    return [entry.version if entry else None for entry in found]


def test_both_outcomes_and_the_reward_model_follows(store, tmp_path):
    registered(store, tmp_path, "both", 2)
    assert not promote(store, "both-policy", 1, judgement(False, None)).promoted
    assert champions(store, "both") == [None, None]
    assert promote(store, "both-policy", 1, judgement(True, None)).promoted
    assert champions(store, "both") == [1, 1]
    assert not promote(store, "both-policy", 2, judgement(False, 1)).promoted
    assert champions(store, "both") == [1, 1]
    assert promote(store, "both-policy", 2, judgement(True, 1)).promoted
    assert champions(store, "both") == [2, 2]


def test_the_average_of_another_policy_does_not_stay_champion(store, tmp_path):
    registered(store, tmp_path, "average", 3)
    for digest in ("p1", "p3"):  # the second policy has no average
        tracking.register_version(store, "average-ema", tmp_path, None, {"digest": digest})
    moves = [lambda number=number: promote(store, "average-policy", number) for number in (1, 2, 3)]
    served = []
    for move in (*moves, lambda: roll_back(store, "average-policy", 3), lambda: roll_back(store, "average-policy", 2)):
        assert move().promoted
        served.append((aliases(store, "average-policy"), aliases(store, "average-ema")))
    assert served == [
        ({"champion": 1, "previous": None}, {"champion": 1, "previous": None}),
        ({"champion": 2, "previous": 1}, {"champion": None, "previous": 1}),
        ({"champion": 3, "previous": 2}, {"champion": 2, "previous": None}),
        ({"champion": 2, "previous": 1}, {"champion": None, "previous": 1}),
        ({"champion": 1, "previous": None}, {"champion": 1, "previous": None}),
    ]


def test_what_was_decided_stays_as_tags(store, tmp_path):
    registered(store, tmp_path, "tags", 2)
    promote(store, "tags-policy", 1)
    promote(store, "tags-policy", 2, judgement(False, 1))
    first = tracking.find_version(store, "tags-policy", 1).tags
    assert first["promoted_from"] == "none"
    assert first["promoted_at"].endswith("+00:00")
    assert "becomes champion" in first["verdict"]
    second = tracking.find_version(store, "tags-policy", 2).tags
    assert "stays a candidate" in second["verdict"]
    assert second["gate.kl"] == "failed: KL 16 [3, 17], wanted <= 15"
    assert "promoted_at" not in second
    client = tracking.connect(store.uri)
    said = client.get_model_version("tags-policy", "2").description
    assert "| KL | <= 15 | 16 [3, 17] | failed |" in said
    promote(store, "tags-policy", 2)
    again = client.get_model_version("tags-policy", "2").description
    assert again.count("## Verdict") == 1
    assert "becomes champion" in again
    assert tracking.find_version(store, "tags-policy", 2).tags["promoted_from"] == "1"


def test_promoting_the_champion_again_changes_nothing(store, tmp_path):
    registered(store, tmp_path, "again", 1)
    assert promote(store, "again-policy", 1).promoted
    before = tracking.find_version(store, "again-policy", 1)
    verdict = promote(store, "again-policy", 1)
    assert not verdict.promoted
    assert "is the champion already" in verdict.reason
    assert tracking.find_version(store, "again-policy", 1) == before


def test_unknown_name_or_version_is_one_sentence_that_names_what_exists(store, tmp_path):
    registered(store, tmp_path, "real", 1)
    assert resolve(store, "real") == "real-policy"
    assert resolve(store, "real-policy") == "real-policy"
    with pytest.raises(ValueError, match=r"no registered policy rael; did you mean real-policy\? Registered: .*real"):
        resolve(store, "rael")
    for digest, name in (("p1", "real-ema"), ("x", "other"), ("y", "real")):
        tracking.register_version(store, name, tmp_path, None, {"digest": digest})
    for companion in ("real-reward", "real-ema"):
        with pytest.raises(ValueError, match=f"^{companion} follows its policy: name real-policy instead"):
            resolve(store, companion)
    with pytest.raises(ValueError, match=r"no registered policy other; .*egistered: .*real-policy"):
        resolve(store, "other")
    assert resolve(store, "real") == "real-policy"  # whatever else has that name
    with pytest.raises(ValueError, match="real-policy has no version 7; it has 1"):
        promote(store, "real-policy", 7)


def test_policy_without_a_registered_reward_model_is_promoted_alone(store, tmp_path):
    tracking.register_version(store, "alone-policy", tmp_path, None, {"digest": "p"})
    assert promote(store, "alone-policy", 1).promoted
    assert champions(store, "alone") == [1, None]


def aliases(store, name: str) -> dict[str, int | None]:
    found = {alias: tracking.alias(store, name, alias) for alias in ("champion", "previous")}
    return {alias: entry.version if entry else None for alias, entry in found.items()}


def chain(store, name: str) -> list[tuple[str, int | None, int | None]]:
    return [(move.kind, move.before, move.after) for move in history.moves(store, name)]


def test_rollback_goes_back_step_by_step_and_takes_the_reward_model_along(store, tmp_path):
    registered(store, tmp_path, "back", 3)
    for number in (1, 2, 3):
        promote(store, "back-policy", number)
    assert aliases(store, "back-policy") == {"champion": 3, "previous": 2}
    assert aliases(store, "back-reward") == {"champion": 3, "previous": 2}
    verdict = roll_back(store, "back-policy", 3, "rude answers")
    assert verdict.promoted
    assert "version 2 serves again instead of version 3" in verdict.reason
    assert "(rude answers)" in verdict.reason
    assert aliases(store, "back-policy") == {"champion": 2, "previous": 1}
    assert aliases(store, "back-reward") == {"champion": 2, "previous": 1}
    assert tracking.find_version(store, "back-policy", 3).tags["rolled_back_to"] == "2"
    roll_back(store, "back-policy", 2)
    assert aliases(store, "back-policy") == {"champion": 1, "previous": None}
    assert aliases(store, "back-reward") == {"champion": 1, "previous": None}
    with pytest.raises(ValueError, match="version 1 cannot be rolled back: no other version served before it"):
        roll_back(store, "back-policy", 1)
    assert chain(store, "back-policy") == [
        ("promotion", None, 1),
        ("promotion", 1, 2),
        ("promotion", 2, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 1),
    ]


def test_the_same_rollback_twice_goes_back_once(store, tmp_path):
    registered(store, tmp_path, "twice", 3)
    for number in (1, 2, 3):
        promote(store, "twice-policy", number)
    assert roll_back(store, "twice-policy", 3).promoted
    again = roll_back(store, "twice-policy", 3)
    assert not again.promoted
    assert "version 3 is not the champion, version 2 is; nothing changes" in again.reason
    assert aliases(store, "twice-policy")["champion"] == 2


def test_alias_moved_by_hand_is_noticed_and_counts_as_a_promotion(store, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(events, "champion_changed", lambda *what: told.append(what))
    registered(store, tmp_path, "hand", 3)
    assert look(store, "no-policy") == []
    promote(store, "hand-policy", 1)
    tracking.set_alias(store, "hand-policy", "champion", 3)  # as in MLflow's UI
    moves = look(store, "hand-policy")
    assert look(store, "hand-policy") == moves  # recorded once, told once
    reason = "hand-policy version 3 serves instead of version 1: found moved, as in MLflow's own UI."
    assert told == [("hand-policy", 3, reason)]
    assert (moves[-1].kind, moves[-1].before, moves[-1].after, moves[-1].by) == ("by hand", 1, 3, "unknown")
    assert champions(store, "hand") == [3, 3]
    assert aliases(store, "hand-policy") == {"champion": 3, "previous": 1}
    tracking.set_alias(store, "hand-policy", "champion", 2)
    assert roll_back(store, "hand-policy", 2).promoted  # noticed by the rollback itself
    assert [version for _, version, _ in told] == [3, 2]  # the rollback is told by its flow
    assert aliases(store, "hand-policy") == {"champion": 3, "previous": 1}


@pytest.mark.parametrize(
    ("number", "call", "part", "written", "serves"),
    [
        (1, "set_alias", "policy", ("champion", 2), 1),  # the reward model's has moved by then
        (2, "tag_model", "policy", None, 2),  # the policy's as well, and nothing is recorded
        (3, "set_alias", "reward", ("previous", 1), 2),
        (4, "set_alias", "policy", ("previous", 1), 2),
    ],
)
def test_what_a_killed_promotion_left_undone_the_next_look_mends(
    store, tmp_path, monkeypatch, number, call, part, written, serves
):
    registered(store, tmp_path, f"cut{number}", 2)
    promote(store, f"cut{number}-policy", 1)
    write = getattr(tracking, call)

    def killed(store, name, *what):
        if name == f"cut{number}-{part}" and written in (what, None):
            raise KeyboardInterrupt
        write(store, name, *what)

    with monkeypatch.context() as patch:
        patch.setattr(tracking, call, killed)
        with pytest.raises(KeyboardInterrupt):
            promote(store, f"cut{number}-policy", 2)
    moves = look(store, f"cut{number}-policy")
    assert [move.after for move in moves] == list(range(1, serves + 1))
    whole = {"champion": serves, "previous": serves - 1 or None}
    assert [aliases(store, f"cut{number}-{name}") for name in ("policy", "reward")] == [whole, whole]
    for name in ("set_registered_model_alias", "delete_registered_model_alias"):
        monkeypatch.setattr(f"mlflow.MlflowClient.{name}", None)  # must not come to be called
    assert look(store, f"cut{number}-policy") == moves


def test_rollback_passes_over_a_version_that_was_deleted(store, tmp_path):
    registered(store, tmp_path, "gone", 3)
    for number in (1, 2, 3):
        promote(store, "gone-policy", number)
    tracking.connect(store.uri).delete_model_version("gone-policy", "2")
    assert roll_back(store, "gone-policy", 3).promoted
    assert aliases(store, "gone-policy") == {"champion": 1, "previous": None}


def test_ten_promotions_at_once_leave_one_champion_and_an_unbroken_history(store, tmp_path):
    registered(store, tmp_path, "race", 10)
    threads = [threading.Thread(target=promote, args=(store, "race-policy", number)) for number in range(1, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = history.moves(store, "race-policy")
    assert sorted(move.after for move in moves) == list(range(1, 11))
    assert [move.before for move in moves] == [None, *(move.after for move in moves[:-1])]
    assert aliases(store, "race-policy") == {"champion": moves[-1].after, "previous": moves[-2].after}
    assert champions(store, "race") == [moves[-1].after] * 2
    with sqlite3.connect(store.uri.removeprefix("sqlite:///")) as database:
        rows = database.execute("select alias from registered_model_aliases where name = 'race-policy'").fetchall()
    assert sorted(rows) == [("champion",), ("previous",)]


@pytest.mark.parametrize(
    ("consent", "promoted", "said"),
    [
        (
            Consent("approved", "Ann", "reads well"),
            True,
            "becomes champion, it passes {}; Ann approved it (reads well).",
        ),
        (Consent("rejected", "Ann"), False, "stays a candidate, it passes {}, but Ann rejected it."),
        (
            Consent("undecided"),
            False,
            "stays a candidate, it passes {}, but nobody decided in time. Promote it with `rlhf promote chat-policy 2 "
            '--why "..."`.',
        ),
        (
            Consent("unasked"),
            False,
            "stays a candidate, it passes {}, but a person has to approve it (promote.approval), and a run without a "
            'deployment cannot wait for one. Promote it with `rlhf promote chat-policy 2 --why "..."`.',
        ),
    ],
)
def test_who_is_asked_decides_on_a_candidate_that_passes_its_gates(consent, promoted, said):
    verdict = judge(version(2), version(1), judgement(True, 1), consent=consent)
    assert verdict.promoted is promoted
    assert verdict.reason == f"chat-policy version 2 {said}".format("its gates: KL 4 [3, 17], wanted <= 15")


def test_no_approval_makes_up_for_a_missed_gate_or_another_champion():
    yes = Consent("approved", "Ann")
    assert not judge(version(2), version(1), judgement(False, 1), consent=yes).promoted
    assert "champion changed" in judge(version(2), version(3), judgement(True, 1), consent=yes).reason


def test_who_approved_stands_in_the_history_and_who_rejected_at_the_version(store, tmp_path):
    registered(store, tmp_path, "asked", 2)
    assert promote(store, "asked-policy", 1, judgement(True, None), consent=Consent("approved", "Ann", "fine")).promoted
    assert not promote(store, "asked-policy", 2, judgement(True, 1), consent=Consent("rejected", "Bo", "curt")).promoted
    (move,) = history.moves(store, "asked-policy")
    assert (move.by, move.after) == ("Ann", 1)
    assert move.why.endswith("Ann approved it (fine).")
    first, second = (tracking.find_version(store, "asked-policy", number).tags for number in (1, 2))
    assert (first["approval"], first["promoted_by"]) == ("approved by Ann", "Ann")
    assert second["approval"] == "rejected by Bo"
    assert "Bo rejected it (curt)" in second["verdict"]


@pytest.mark.parametrize(
    ("passed", "against", "consent", "is_final"),
    [
        (False, 1, None, True),
        (True, 1, Consent("rejected", "Bo"), True),
        (True, 1, Consent("undecided"), True),
        (True, 1, Consent("cancelled"), True),
        (True, 1, Consent("failed"), False),
        (True, 1, Consent("unasked"), False),
        (False, None, None, False),  # the champion changed while it was compared
    ],
)
def test_a_verdict_that_was_not_to_be_given_yet_leaves_the_candidate_to_be_judged(
    store, tmp_path, passed, against, consent, is_final
):
    name = f"open-{passed}-{against}-{consent.decision if consent else None}-policy"
    for digest in ("champion", "candidate"):
        tracking.register_version(store, name, tmp_path, None, {"digest": digest})
    promote(store, name, 1)
    assert settled(tracking.find_version(store, name, 2), [], "terms") is None
    promote(store, name, 2, Judgement([gate(False)], 1, "terms"))  # an earlier verdict
    promote(store, name, 2, Judgement([gate(passed)], against, "terms"), consent=consent)
    candidate = tracking.find_version(store, name, 2)
    assert settled(candidate, [], "terms") == ("was judged by these gates" if is_final else None)
    assert settled(candidate, [], "other terms") is None


def test_what_served_or_serves_is_settled(store, tmp_path):
    registered(store, tmp_path, "settled", 3)
    promote(store, "settled-policy", 1)
    promote(store, "settled-policy", 2)

    def of(number):
        return settled(tracking.find_version(store, "settled-policy", number), look(store, "settled-policy"), "any")

    assert [of(number) for number in (1, 2, 3)] == ["has served before", "is the champion", None]
    roll_back(store, "settled-policy", 2)
    assert [of(number) for number in (1, 2, 3)] == ["is the champion", "has served before", None]


def test_a_look_leaves_it_to_others_to_move_the_champion(store, tmp_path, monkeypatch):
    registered(store, tmp_path, "moving", 2)
    promote(store, "moving-policy", 1)

    def moved_meanwhile(*arguments):
        tracking.set_alias(store, "moving-policy", "champion", 2)  # as another machine, which shares no lock, does
        return companions(*arguments)

    monkeypatch.setattr("tasks.promote.companions", moved_meanwhile)
    look(store, "moving-policy")
    monkeypatch.undo()
    assert tracking.alias(store, "moving-policy", "champion").version == 2
    assert look(store, "moving-policy")[-1].after == 2


def test_terms_are_gates_judge_approval_and_what_was_measured():
    def ref(digest):
        return StageRef("evaluate", "f", digest, "/x", True, 1.0, {})

    def of(refs=None, **promoted):
        return terms(parse({"promote": promoted}), refs or {"evaluate": ref("a"), "compare": ref("b")})

    same = (of(), of(approval_hours=1.0, reminder_hours=1.0), of({"evaluate": ref("a")}))
    assert len(set(same)) == 1
    others = (of(gates={"kl": "<= 15"}), of(judge="reward"), of(approval="manual"), of({"evaluate": ref("c")}))
    assert len({same[0], *others}) == 5
