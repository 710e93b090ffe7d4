import multiprocessing
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tasks import lineage, prune, tracking, unfinished
from tasks.registered import copied
from tasks.stages import Stage, run


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking.open_store(tmp_path_factory.mktemp("template"))


@pytest.fixture
def store(template, tmp_path):
    (tmp_path / "mlflow.db").write_bytes((Path(template.workspace) / "mlflow.db").read_bytes())
    return tracking.open_store(tmp_path)


def made(store, name: str, inputs=None, content="x" * 1000, **config):
    def work(directory):
        (directory / "out.txt").write_text(content)
        return {}

    return run(Stage(name, Path(store.workspace), config, inputs or {}, ()), work)


def registered(store, seed: int) -> int:
    """A policy of its own SFT, on a base and a gold reward model that all share, with verdicts of an API's judge; its
    files are linked, as `tasks.register` does."""
    base = made(store, "base")
    sft = made(store, "sft", {"base": base}, f"sft {seed}" * 100, seed=seed)
    ppo = made(store, "ppo", {"sft": sft}, f"ppo {seed}" * 100, seed=seed)
    gold = made(store, "gold", {"base": base})
    evaluated = made(store, "evaluate", {"ppo": ppo, "gold": gold}, f"wins {seed}" * 100, seed=seed)
    made(store, "verdicts", {"evaluate": evaluated}, f"[[A]] {seed}" * 100, seed=seed)

    def link(directory):
        (directory / "policy").mkdir()
        os.link(ppo.directory / "out.txt", directory / "policy" / "out.txt")
        lineage.write(directory / "policy", ppo.directory)
        return {}

    inputs = {"policy": ppo, "evaluate": evaluated}
    registered = run(Stage("register", Path(store.workspace), {"seed": seed}, inputs, ()), link)
    return tracking.register_version(
        store, "chat-policy", registered.directory / "policy", None, {"digest": ppo.digest}
    )


def left(store) -> list[int]:
    """Directories of base, SFT, PPO, evaluation, registered files, fetched copies, gold reward model and verdicts."""
    stages = ("base", "sft", "ppo", "evaluate", "register", "champion", "gold", "verdicts")
    return [len(list((Path(store.workspace) / stage).glob("*/"))) for stage in stages]


def test_what_a_version_was_made_from_stays(store):
    registered(store, 1)
    made(store, "sft", {"base": made(store, "base")}, "tried once" * 100, seed=99)
    unfinished = Path(store.workspace) / "ppo" / "0123456789abcdef" / "checkpoints"
    unfinished.mkdir(parents=True)
    (unfinished / "weights").write_bytes(bytes(5000))
    copy = Path(store.workspace) / "champion" / "0123456789abcdef"
    copy.mkdir(parents=True)
    tried = made(store, "evaluate", content="tried once" * 100, seed=99)
    made(store, "verdicts", {"evaluate": tried}, "[[B]]" * 100, seed=99)
    planned = prune.plan(store)
    assert {(r.directory.parent.name, r.why) for r in planned.removals} == {
        ("sft", "nothing registered needs it"),
        ("evaluate", "nothing registered needs it"),
        ("verdicts", "nothing registered needs it"),
        ("ppo", "was not finished"),
        ("champion", "a copy of a registered model"),
    }
    assert left(store) == [1, 2, 2, 2, 1, 1, 1, 2]  # a plan changes nothing
    prune.carry_out(store, planned)
    assert left(store) == [1, 1, 1, 1, 1, 0, 1, 1]
    assert prune.plan(store) == prune.Plan([], [])
    assert not list(Path(store.workspace).glob("*/.removed-*"))


def test_the_fetched_copy_of_what_an_alias_names_stays(store):
    for seed in (1, 2):
        registered(store, seed)
    tracking.set_alias(store, "chat-policy", "champion", 2)
    copies = {}
    for version in tracking.versions(store, "chat-policy"):
        copies[version.version] = run(copied(version, Path(store.workspace)), lambda directory: {}).directory
    assert [removal.directory for removal in prune.plan(store).removals] == [copies[1]]


def test_a_later_evaluation_of_a_version_stays_as_the_next_run_asks_for_it(store):
    registered(store, 1)
    ppo = made(store, "ppo", {"sft": made(store, "sft", {"base": made(store, "base")}, seed=1)}, seed=1)
    evaluated = made(store, "evaluate", {"ppo": ppo}, "of more prompts" * 100, seed=1, prompts=400)
    made(store, "register", {"policy": ppo, "evaluate": evaluated}, seed=1)
    assert left(store)[3:5] == [2, 2]
    assert prune.plan(store).removals == []


def test_keep_deletes_old_versions_but_none_with_an_alias(store):
    for seed in (1, 2, 3):
        registered(store, seed)
    tracking.set_alias(store, "chat-policy", "champion", 1)
    planned = prune.plan(store, keep=1)
    assert [version.version for version in planned.versions] == [2]
    # The policy of version 2 has two names, in ppo/ and register/, and both go: it counts once.
    names = {removal.directory.parent.name for removal in planned.removals}
    assert names == {"sft", "ppo", "evaluate", "verdicts", "register"}
    files = {
        path.stat().st_ino: path.stat().st_size
        for removal in planned.removals
        for path in removal.directory.rglob("*")
        if path.is_file()
    }
    assert planned.size == sum(files.values())
    prune.carry_out(store, planned)
    assert [version.version for version in tracking.versions(store, "chat-policy")] == [3, 1]
    for version in tracking.versions(store, "chat-policy"):
        lineage.of_version(store, version)
        assert (Path(unquote(urlsplit(version.source).path)) / "out.txt").exists()


def test_a_file_that_another_directory_links_to_frees_nothing(store):
    registered(store, 1)
    kept = next((Path(store.workspace) / "ppo").glob("*/out.txt"))
    copy = Path(store.workspace) / "champion" / "c"
    copy.mkdir(parents=True)
    os.link(kept, copy / "out.txt")
    assert prune.plan(store).size == 0


def test_an_alias_that_moves_meanwhile_saves_its_version(store):
    for seed in (1, 2):
        registered(store, seed)
    planned = prune.plan(store, keep=1)
    tracking.set_alias(store, "chat-policy", "champion", 1)
    with pytest.raises(ValueError, match="chat-policy version 1 is champion now"):
        prune.carry_out(store, planned)
    assert left(store)[4] == 2


def test_what_a_crashed_run_goes_on_from_stays_until_the_run_ends_or_is_given_up(store):
    workspace = Path(store.workspace)
    sft = made(store, "sft", {"base": made(store, "base")}, seed=1)
    stopped = workspace / "ppo" / "0123456789abcdef"
    (stopped / "checkpoints").mkdir(parents=True)
    made(store, "sft", seed=2)  # another run's
    for directory in (sft.directory, stopped):
        unfinished.note(workspace, "a-run", directory)
    planned = prune.plan(store)
    assert planned.spared == 2
    prune.carry_out(store, planned)
    assert left(store)[:3] == [0, 1, 1]
    path = workspace / "unfinished" / "a-run"
    week_ago = path.stat().st_mtime - 7.1 * 24 * 3600
    os.utime(path, (week_ago, week_ago))
    assert len(prune.plan(store).removals) == 2
    os.utime(path)
    assert prune.plan(store).removals == []
    unfinished.suspended(workspace, "a-run", hours=300)
    suspended = path.stat().st_mtime
    for days, spared in ((-12.5 - 6.9, 2), (-12.5 - 7.1, 0)):  # 300 h, and then a week
        os.utime(path, (suspended + days * 24 * 3600,) * 2)
        assert prune.plan(store).spared == spared
    os.utime(path)
    unfinished.forget(workspace, "a-run")
    assert len(prune.plan(store).removals) == 2


def test_what_was_registered_since_the_plan_stays(store):
    made(store, "sft", seed=9)
    base = made(store, "base")
    planned = prune.plan(store)
    assert len(planned.removals) == 2
    registered(store, 1)  # on that base, by a run that came and went meanwhile
    assert [removal.directory.parent.name for removal in prune.carry_out(store, planned)] == ["sft"]
    assert base.directory.is_dir()


def hold(workspace: str, ready, done) -> None:
    with prune.in_use(Path(workspace)):
        ready.set()
        done.wait(60)


def test_nothing_is_removed_under_a_run_and_a_dead_run_holds_nothing(store):
    made(store, "sft", seed=1)
    planned = prune.plan(store)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(store.workspace, ready, done))
    process.start()
    assert ready.wait(60)
    with prune.in_use(Path(store.workspace)), pytest.raises(ValueError, match="a run is going on"):  # two runs at once
        prune.carry_out(store, planned)
    process.kill()
    process.join()
    prune.carry_out(store, planned)
    assert left(store)[1] == 0
