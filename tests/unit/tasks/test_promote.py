import pytest

from tasks import tracking
from tasks.promote import Judgement, decide, judge, needs_comparison, promote, resolve
from tasks.tracking import Version


def version(number: int, digest: str = "", name: str = "chat-policy") -> Version:
    return Version(name, number, (), {"digest": digest or f"digest {number}"}, "file:///x", None, 0.0)


@pytest.mark.parametrize(("win_rate", "promoted"), [(0.5, False), (0.499, False), (0.505, True), (1.0, True)])
def test_champion_moves_only_for_more_than_the_limit(win_rate, promoted):
    assert decide(version(2), version(1), win_rate, 0.5).promoted is promoted
    assert decide(version(1), None, win_rate, 0.5).promoted is promoted


def test_reason_names_version_rival_win_rate_and_limit():
    first = decide(version(1), None, 0.625, 0.5).reason
    assert first == (
        "chat-policy version 1 becomes champion: it wins 62.5 % of the held-out prompts against the SFT model, "
        "more than 50 %."
    )
    later = decide(version(3), version(2), 0.5, 0.5).reason
    assert later == (
        "chat-policy version 3 stays a candidate: it wins 50 % of the held-out prompts against the champion, "
        "version 2, and it takes more than 50 %."
    )


def test_champion_itself_is_left_as_it_is_even_under_another_number():
    for candidate, champion in ((version(2), version(2)), (version(3, "same"), version(2, "same"))):
        verdict = decide(candidate, champion, 0.9, 0.5)
        assert not verdict.promoted
        assert "is the champion already" in verdict.reason
        assert not needs_comparison(candidate, champion)


def test_comparison_is_needed_against_another_champion_only():
    assert needs_comparison(version(2), version(1))
    assert not needs_comparison(version(1), None)


@pytest.mark.parametrize(("compared_with", "present"), [(None, 1), (1, None), (1, 2)])
def test_verdict_on_a_champion_that_is_gone_is_not_given(compared_with, present):
    champion = version(present) if present else None
    verdict = judge(version(9), champion, Judgement(0.9, 0.5, compared_with))
    assert not verdict.promoted
    assert "the champion changed" in verdict.reason
    assert judge(version(9), champion, Judgement(0.9, 0.5, present)).promoted


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
    assert not promote(store, "both-policy", 1, Judgement(0.4, 0.5, None)).promoted
    assert champions(store, "both") == [None, None]
    assert promote(store, "both-policy", 1, Judgement(0.6, 0.5, None)).promoted
    assert champions(store, "both") == [1, 1]
    assert not promote(store, "both-policy", 2, Judgement(0.5, 0.5, 1)).promoted
    assert champions(store, "both") == [1, 1]
    assert promote(store, "both-policy", 2, Judgement(0.51, 0.5, 1)).promoted
    assert champions(store, "both") == [2, 2]


def test_what_was_decided_stays_as_tags(store, tmp_path):
    registered(store, tmp_path, "tags", 2)
    promote(store, "tags-policy", 1)
    promote(store, "tags-policy", 2, Judgement(0.1, 0.5, 1))
    first = tracking.find_version(store, "tags-policy", 1).tags
    assert first["promoted_from"] == "none"
    assert first["promoted_at"].endswith("+00:00")
    assert "becomes champion" in first["verdict"]
    second = tracking.find_version(store, "tags-policy", 2).tags
    assert "stays a candidate" in second["verdict"]
    assert "promoted_at" not in second
    promote(store, "tags-policy", 2)
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
    with pytest.raises(ValueError, match=r"no registered model rael; did you mean real-policy\? Registered: .*real"):
        resolve(store, "rael")
    with pytest.raises(ValueError, match="promote real-policy instead"):
        resolve(store, "real-reward")
    with pytest.raises(ValueError, match="real-policy has no version 7; it has 1"):
        promote(store, "real-policy", 7)


def test_policy_without_a_registered_reward_model_is_promoted_alone(store, tmp_path):
    tracking.register_version(store, "alone-policy", tmp_path, None, {"digest": "p"})
    assert promote(store, "alone-policy", 1).promoted
    assert champions(store, "alone") == [1, None]
