from typing import Any

from tasks import difference
from tasks.tracking import Version


def version(number: int, **tags: str) -> Version:
    return Version(
        "chat-policy", number, (), {name.replace("__", "."): text for name, text in tags.items()}, "", None, 0
    )


def record(kl_coef: float, revision: str, commit: str) -> dict[str, Any]:
    code = {"commit": commit}
    steps = {
        "download/a": {
            "stage": "download",
            "config": {"source": "SHP", "revision": None},
            "metrics": {"revision": revision},
            "code": code,
        },
        "ppo/b": {
            "stage": "ppo",
            "config": {"ppo": {"kl_coef": kl_coef, "steps": 3}, "seed": 0},
            "metrics": {},
            "code": code,
        },
    }
    return {"root": "ppo/b", "steps": steps}


def test_figures_stand_side_by_side_and_a_missing_one_is_empty() -> None:
    first = version(1, metric__win_rate="0.5", digest="a", gate__kl="passed: ...")
    second = version(2, metric__win_rate="0.6", metric__ppo_kl="2.5", digest="b")
    assert difference.measured(first, second) == [
        ("ppo_kl", "", "2.5"),
        ("win_rate", "0.5", "0.6"),
        ("gate kl", "passed: ...", ""),
    ]


def test_only_what_differs_is_named_as_in_the_config() -> None:
    same = record(0.1, "r1", "c" * 40)
    assert difference.made(same, same) == []
    assert difference.made(same, record(0.2, "r2", "c" * 40)) == [
        ("download SHP.revision read", "r1", "r2"),
        ("ppo.kl_coef", "0.1", "0.2"),
    ]
    codes = difference.made(same, record(0.1, "r1", "d" * 40))
    assert [name for name, _, _ in codes] == ["download SHP.code", "ppo.code"]
