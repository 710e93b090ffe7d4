"""Promotion: which version of a model is the champion, the one that serves.

The rule: a candidate becomes champion if it wins more than `promote.min_win_rate` of the held-out prompts, the first
one against the SFT model it comes from, each later one against the present champion. A person may promote any version.
The reward model and the moving average follow their policy. What was decided, when and why stays as tags.
"""

import difflib
import getpass
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import tracking
from tasks.tracking import CHAMPION, Store, Version

POLICY, REWARD, EMA = "-policy", "-reward", "-ema"


@dataclass(frozen=True)
class Verdict:
    """Whether a version becomes champion, and why, as a sentence."""

    promoted: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What a candidate was measured at."""

    win_rate: float
    min_win_rate: float
    champion: int | None
    """Version of the champion that it was set against; None: the SFT model, as there was no champion."""


@task(name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_model(store: Store, name: str, version: int, judgement: Judgement | None) -> Verdict:
    """Make a version the champion if it deserves it. See `promote`."""
    return promote(store, name, version, judgement)


def promote(store: Store, name: str, version: int, judgement: Judgement | None = None) -> Verdict:
    """Make a version of a policy the champion, and its reward model's version the champion of reward models.

    Without a judgement it is a person's wish and is granted. Raises ValueError for a version that is not there.
    """
    candidate = tracking.find_version(store, name, version)
    with tracking.registry_lock(store):
        champion = tracking.alias(store, name, CHAMPION)
        verdict = judge(candidate, champion, judgement)
        if champion is not None and _same(candidate, champion):
            return verdict  # what is recorded of its promotion stays
        if verdict.promoted:
            for companion in companions(store, candidate):
                tracking.set_alias(store, companion.name, CHAMPION, companion.version)
            # The policy last: whoever sees the new policy serve finds its reward model in place.
            tracking.set_alias(store, name, CHAMPION, version)
        tracking.tag_version(store, name, version, _verdict_tags(verdict, champion))
    return verdict


def judge(candidate: Version, champion: Version | None, judgement: Judgement | None) -> Verdict:
    """The verdict on a candidate, measured or wished for."""
    if judgement is None:
        if champion is not None and _same(candidate, champion):
            return _unchanged(candidate)
        instead = f" instead of version {champion.version}" if champion else ""
        return Verdict(True, f"{_title(candidate)} becomes champion{instead}: {_user()} promoted it.")
    present = champion.version if champion else None
    if present != judgement.champion and not (champion and _same(candidate, champion)):
        was = f"version {judgement.champion}" if judgement.champion else "none"
        return Verdict(
            False,
            f"{_title(candidate)} stays a candidate: the champion changed from {was} to "
            f"{f'version {present}' if present else 'none'} while it was compared; run it again.",
        )
    return decide(candidate, champion, judgement.win_rate, judgement.min_win_rate)


def decide(candidate: Version, champion: Version | None, win_rate: float, min_win_rate: float) -> Verdict:
    """The rule: more than `min_win_rate` of the held-out prompts, against the champion or, without one, against SFT."""
    if champion is not None and _same(candidate, champion):
        return _unchanged(candidate)
    rival = f"champion, version {champion.version}" if champion else "SFT model"
    won = f"it wins {_percent(win_rate)} of the held-out prompts against the {rival}"
    if win_rate > min_win_rate:
        return Verdict(True, f"{_title(candidate)} becomes champion: {won}, more than {_percent(min_win_rate)}.")
    return Verdict(
        False, f"{_title(candidate)} stays a candidate: {won}, and it takes more than {_percent(min_win_rate)}."
    )


def needs_comparison(candidate: Version, champion: Version | None) -> bool:
    """Whether the candidate has to be compared with the champion; else the evaluation against SFT decides."""
    return champion is not None and not _same(candidate, champion)


def resolve(store: Store, name: str) -> str:
    """The registered policy that a user means by NAME or NAME-policy. Raises ValueError that names what exists."""
    names = tracking.registered_names(store)
    policies = [known for known in names if known.endswith(POLICY)]
    if name in names and name.endswith(REWARD) and name.removesuffix(REWARD) + POLICY in names:
        raise ValueError(f"{name} follows its policy: promote {name.removesuffix(REWARD)}{POLICY} instead.")
    for known in (name, f"{name}{POLICY}"):
        if known in names:
            return known
    if not policies:
        raise ValueError(f"There is no registered model {name}, nor any other: `rlhf run` registers the first.")
    near = difflib.get_close_matches(name.removesuffix(POLICY), [known.removesuffix(POLICY) for known in policies], n=1)
    hint = f"did you mean {near[0]}{POLICY}? Registered" if near else "registered"
    raise ValueError(f"There is no registered model {name}; {hint}: {', '.join(policies)}.")


def companions(store: Store, policy: Version) -> list[Version]:
    """The versions that follow a policy, as far as they are registered: its reward model, and its moving average."""
    stem = policy.name.removesuffix(POLICY)
    wanted = ((stem + REWARD, policy.tags.get("input.reward.digest")), (stem + EMA, policy.digest))
    found = (
        next((v for v in tracking.versions(store, name) if digest and v.digest == digest), None)
        for name, digest in wanted
    )
    return [version for version in found if version is not None]


def _verdict_tags(verdict: Verdict, champion: Version | None) -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if not verdict.promoted:
        return {"verdict": verdict.reason, "verdict_at": now}
    return {
        "verdict": verdict.reason,
        "verdict_at": now,
        "promoted_at": now,
        "promoted_by": _user(),
        "promoted_from": str(champion.version) if champion else "none",
    }


def _unchanged(candidate: Version) -> Verdict:
    return Verdict(False, f"{_title(candidate)} is the champion already; nothing changes.")


def _same(candidate: Version, champion: Version) -> bool:
    """Whether two versions are one model: the same files, under whatever number."""
    return candidate.version == champion.version or (
        candidate.digest is not None and candidate.digest == champion.digest
    )


def _title(version: Version) -> str:
    return f"{version.name} version {version.version}"


def _percent(share: float) -> str:
    """A share in percent, with as many digits as it has, up to hundredths: 0.5 is 50 %, 0.5025 is 50.25 %."""
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + " %"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return "unknown"
