"""Promotion and rollback: which version of a model is the champion, the one that serves.

The rule: a candidate becomes champion if it passes the gates of its run (`tasks.gates`), the first one against the SFT
model it comes from, each later one against the present champion. A person may promote any version, or take the
champion back. The reward model and the moving average follow their policy, and so does the alias `previous`. What was
decided, when, by whom and why stays as tags: the verdict at the version, the moves at the model (`tasks.history`).
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import events, history, tracking
from tasks.config import RunConfig
from tasks.gates import GateResult
from tasks.history import Move
from tasks.registered import EMA, POLICY, REWARD, companions
from tasks.stages import StageRef
from tasks.tracking import CHAMPION, PREVIOUS, Store, Version

VERDICT = "## Verdict"
"""Where it begins in a version's description."""
JUDGED = "judged"
"""Tag of a version: the `terms` of its last verdict, if that is final."""


@dataclass(frozen=True)
class Verdict:
    """Whether the champion changed, and why, as a sentence."""

    promoted: bool
    reason: str
    gates: list[GateResult] = field(default_factory=list)
    final: bool = True
    """False: what was to be decided is still open, and the next run of a deployment judges anew."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What a candidate was measured at."""

    gates: list[GateResult]
    champion: int | None
    """Version of the champion that it was set against; None: the SFT model, as there was no champion."""
    terms: str = ""
    """What it was judged by: see `terms`."""


@dataclass(frozen=True)
class Consent:
    """What a person said to a candidate that passes its gates, where the config wants one to be asked."""

    decision: Literal["approved", "rejected", "undecided", "unasked", "cancelled", "failed"]
    """undecided: the time for it is over; unasked: the run could not wait, as it has no deployment; cancelled, failed:
    so the run ended while it waited."""
    by: str = ""
    comment: str = ""

    def sentence(self, version: Version) -> str:
        """What was said, for the end of a verdict; if nothing was, how to promote the version all the same."""
        if self.decision in ("approved", "rejected"):
            return f"{self.by} {self.decision} it" + (f" ({self.comment})" if self.comment else "")
        reasons = {
            "undecided": "nobody decided in time",
            "unasked": "a person has to approve it (promote.approval), and a run without a deployment cannot wait for "
            "one",
            "cancelled": "its run was cancelled while it waited for approval",
            "failed": "its run failed before it was decided on",
        }
        return f'{reasons[self.decision]}. Promote it with `rlhf promote {version.name} {version.version} --why "..."`'


@task(name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_model(
    store: Store, name: str, version: int, judgement: Judgement | None, why: str, consent: Consent | None
) -> Verdict:
    """Make a version the champion if it deserves it. See `promote`."""
    return promote(store, name, version, judgement, why, consent)


@task(name="roll back", cache_policy=NO_CACHE, persist_result=False)
def roll_back_model(store: Store, name: str, version: int, why: str) -> Verdict:
    """Take a champion back. See `roll_back`."""
    return roll_back(store, name, version, why)


def promote(
    store: Store,
    name: str,
    version: int,
    judgement: Judgement | None = None,
    why: str = "",
    consent: Consent | None = None,
) -> Verdict:
    """Make a version of a policy the champion, and its reward model's version the champion of reward models.

    Without a judgement it is a person's wish and is granted; with one, a `consent` that is no approval keeps the
    champion. Raises ValueError for a version that is not there.
    """
    candidate = tracking.find_version(store, name, version)
    with tracking.registry_lock(store):
        moves = follow(store, name)
        champion = tracking.alias(store, name, CHAMPION)
        verdict = judge(candidate, champion, judgement, why, consent)
        if champion is not None and _same(candidate, champion):
            return verdict  # what is recorded of its promotion stays
        if verdict.promoted:
            by = consent.by if consent else None
            _serve(store, candidate, champion, moves, history.PROMOTION, verdict.reason, by)
        tags = _verdict_tags(verdict, candidate, champion, consent)
        if judgement is not None:
            tags[JUDGED] = (verdict.final and judgement.terms) or "not yet"
        tracking.tag_version(store, name, version, tags)
        tracking.add_to_description(store, name, version, VERDICT, "\n".join(_verdict_lines(verdict)))
    return verdict


def roll_back(store: Store, name: str, version: int, why: str = "") -> Verdict:
    """Make the champion again what it was before `version` became it, if `version` is the champion.

    So the same call twice takes one version back, not two. Raises ValueError where nothing served before.
    """
    with tracking.registry_lock(store):
        moves = follow(store, name)
        known = {entry.version: entry for entry in tracking.versions(store, name)}
        champion = next((entry for entry in known.values() if CHAMPION in entry.aliases), None)
        if champion is None or champion.version != version:
            serving = f"version {champion.version} is" if champion else "there is none"
            return Verdict(False, f"{name} version {version} is not the champion, {serving}; nothing changes.")
        target = history.previous(moves, set(known))
        if target is None:
            raise ValueError(f"{_title(champion)} cannot be rolled back: no other version served before it.")
        reason = f"{_title(known[target])} serves again instead of version {version}: {_wish('rolled it back', why)}."
        _serve(store, known[target], champion, moves, history.ROLLBACK, reason)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        tags = {"rolled_back_at": now, "rolled_back_by": history.user(), "rolled_back_to": str(target)}
        tracking.tag_version(store, name, version, tags)
    return Verdict(True, reason)


def follow(store: Store, name: str) -> list[Move]:
    """The moves of a policy's champion. One that was made by hand is recorded and told, and whatever goes with the
    champion follows: a companion, or `previous`, may also stand where a promotion that was killed has left it.

    Hold the registry's lock.
    """
    known = history.moves(store, name)
    moves = history.noticed(store, name)
    champion = tracking.alias(store, name, CHAMPION)
    # The policy's own alias is only read: it is what says who serves, and another machine may be moving it.
    _point_companions(store, name, CHAMPION, champion)
    _point_previous(store, name, moves)
    if len(moves) > len(known) and champion is not None:
        before = f"instead of version {moves[-1].before}" if moves[-1].before else "as the first"
        events.champion_changed(name, champion.version, f"{_title(champion)} serves {before}: {moves[-1].why}.")
    return moves


def look(store: Store, name: str) -> list[Move]:
    """As `follow`, for who does not hold the lock; none where there is no such policy yet."""
    with tracking.registry_lock(store):
        return follow(store, name) if name in tracking.registered_names(store) else []


def _serve(
    store: Store,
    version: Version,
    champion: Version | None,
    moves: Sequence[Move],
    kind: str,
    why: str,
    by: str | None = None,
) -> None:
    """Move the aliases and record it, as done `by` whoever approved it or else by who runs this process."""
    # The policy last: whoever sees the new policy serve finds its reward model in place.
    _point_companions(store, version.name, CHAMPION, version)
    tracking.set_alias(store, version.name, CHAMPION, version.version)
    before = champion.version if champion else None
    move = history.record(store, version.name, kind, before, version.version, why, by)
    _point_previous(store, version.name, [*moves, move])


def _point_previous(store: Store, name: str, moves: Sequence[Move]) -> None:
    """The alias `previous` of a policy and its companions: what a rollback would go to."""
    known = {entry.version: entry for entry in tracking.versions(store, name)}
    number = history.previous(moves, set(known))
    _point_companions(store, name, PREVIOUS, known[number] if number is not None else None)
    tracking.set_alias(store, name, PREVIOUS, number)


def _point_companions(store: Store, name: str, alias: str, version: Version | None) -> None:
    """Point an alias of a policy's companions at what goes with a version of it.

    Of a companion that the version lacks it is taken away, of both where the version is None.
    """
    wanted = {entry.name: entry.version for entry in (companions(store, version) if version is not None else [])}
    stem = name.removesuffix(POLICY)
    for model in (stem + REWARD, stem + EMA):
        tracking.set_alias(store, model, alias, wanted.get(model))


def judge(
    candidate: Version,
    champion: Version | None,
    judgement: Judgement | None,
    why: str = "",
    consent: Consent | None = None,
) -> Verdict:
    """The verdict on a candidate, measured or wished for."""
    if champion is not None and _same(candidate, champion):
        return Verdict(False, f"{_title(candidate)} is the champion already; nothing changes.")
    if judgement is None:
        instead = f" instead of version {champion.version}" if champion else ""
        return Verdict(True, f"{_title(candidate)} becomes champion{instead}: {_wish('promoted it', why)}.")
    present = champion.version if champion else None
    if present != judgement.champion:
        was = f"version {judgement.champion}" if judgement.champion else "none"
        reason = (
            f"{_title(candidate)} stays a candidate: the champion changed from {was} to "
            f"{f'version {present}' if present else 'none'} while it was compared; run it again."
        )
        return Verdict(False, reason, judgement.gates, final=False)
    return decide(candidate, judgement.gates, consent)


def decide(candidate: Version, results: list[GateResult], consent: Consent | None = None) -> Verdict:
    """The rule: a candidate that passes every gate becomes champion, if nobody who was to be asked objects."""
    failed = [result for result in results if not result.passed]
    said = "; ".join(f"{result.title} {result.measured}, wanted {result.sentence}" for result in failed or results)
    if failed:
        missed = "a gate" if len(failed) == 1 else f"{len(failed)} gates"
        return Verdict(False, f"{_title(candidate)} stays a candidate, it misses {missed}: {said}.", results)
    passed = f"it passes its gates: {said}" if results else "its run sets no gate"
    if consent is None:
        return Verdict(True, f"{_title(candidate)} becomes champion, {passed}.", results)
    said = consent.sentence(candidate)
    if consent.decision == "approved":
        return Verdict(True, f"{_title(candidate)} becomes champion, {passed}; {said}.", results)
    reason = f"{_title(candidate)} stays a candidate, {passed}, but {said}."
    return Verdict(False, reason, results, final=consent.decision not in ("unasked", "failed"))


def terms(config: RunConfig, refs: Mapping[str, StageRef]) -> str:
    """What a verdict on a run's policy hangs on beside the champion: gates, judge, approval and what was measured.

    16 hex digits; others call for another verdict.

    Args:
        refs: the run's finished stages by key; more than those that measure may be there.
    """
    settings = config.promote
    measured = {key: refs[key].digest for key in ("reward", "gold", "evaluate", "verdicts") if key in refs}
    tree = [settings.gates.sentences, settings.judge, settings.approval, measured]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def settled(version: Version, moves: Sequence[Move], terms: str) -> str | None:
    """What has been decided on a version of a policy with these moves; None where that is still to be done.

    One that served and was replaced, perhaps by a person, does not come back by itself, whatever the terms are now.
    """
    if CHAMPION in version.aliases:
        return "is the champion"
    if any(move.before == version.version for move in moves):
        return "has served before"
    if version.tags.get(JUDGED) == terms:
        return "was judged by these gates"
    return None


def needs_comparison(candidate: Version, champion: Version | None) -> bool:
    """Whether the candidate has to be compared with the champion; else the evaluation against SFT decides."""
    return champion is not None and not _same(candidate, champion)


def resolve(store: Store, name: str) -> str:
    """The registered policy that a user means by NAME or NAME-policy.

    Raises ValueError that names what exists, or, for a registered model that is no policy, what to name instead.
    """
    names = tracking.registered_names(store)
    policies = [known for known in names if known.endswith(POLICY)]
    for suffix in (REWARD, EMA):
        own = name.removesuffix(suffix) + POLICY
        if name in names and name.endswith(suffix) and own in policies:
            raise ValueError(f"{name} follows its policy: name {own} instead.")
    for known in (name, f"{name}{POLICY}"):
        if known in policies:
            return known
    if not policies:
        raise ValueError(f"There is no registered policy {name}, nor any other: `rlhf run` registers the first.")
    near = difflib.get_close_matches(name.removesuffix(POLICY), [known.removesuffix(POLICY) for known in policies], n=1)
    hint = f"did you mean {near[0]}{POLICY}? Registered" if near else "registered"
    raise ValueError(f"There is no registered policy {name}; {hint}: {', '.join(policies)}.")


def _verdict_tags(
    verdict: Verdict, candidate: Version, champion: Version | None, consent: Consent | None
) -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tags = {"verdict": verdict.reason, "verdict_at": now}
    if consent is not None:
        tags["approval"] = f"{consent.decision} by {consent.by}" if consent.by else consent.decision
    elif "approval" in candidate.tags:
        tags["approval"] = "decided otherwise"
    tags |= {f"gate.{result.name}": result.verdict for result in verdict.gates}
    if verdict.promoted:
        before = str(champion.version) if champion else "none"
        by = consent.by if consent else history.user()
        tags |= {"promoted_at": now, "promoted_by": by, "promoted_from": before}
    return tags


def _verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict and its gates as Markdown: the part of the model card that is known last."""
    rows = [
        f"| {gate.title} | {gate.sentence} | {gate.measured} | {'passed' if gate.passed else 'failed'} |"
        for gate in verdict.gates
    ]
    table = ["", "| Gate | Wanted | Measured | Verdict |", "|---|---|---|---|", *rows] if rows else []
    return [verdict.reason, *table]


def _wish(done: str, why: str) -> str:
    return f"{history.user()} {done}" + (f" ({why})" if why else "")


def _same(candidate: Version, champion: Version) -> bool:
    """Whether two versions are one model: the same files, under whatever number."""
    return candidate.version == champion.version or (
        candidate.digest is not None and candidate.digest == champion.digest
    )


def _title(version: Version) -> str:
    return f"{version.name} version {version.version}"
