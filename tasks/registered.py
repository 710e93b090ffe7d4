"""Registered models as folders on this machine: for the comparison with the champion, a warm start, a chat.

In a config, `models:/NAME@ALIAS` is the version that the alias names when a run begins. The run then reads that
version's folder, and keeps which version it was as the model's revision, which is what lineage shows.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks import dag, stages, tracking
from tasks.config import ConfigError, RunConfig
from tasks.stages import Stage, StageRef
from tasks.tracking import Store, Version

SCHEME = "models:/"
POLICY, REWARD, EMA = "-policy", "-reward", "-ema"


def pinned(config: RunConfig) -> RunConfig:
    """The config with the models that it names by `models:/` as folders, each with its version as its revision.

    Raises ConfigError for a model, version or alias that is not there, or whose files are gone.
    """
    named = {
        key: value
        for key in ("policy", "reward")
        if isinstance(value := getattr(config.models, key), str) and value.startswith(SCHEME)
    }
    if not named:
        return config
    workspace = dag.workspace(config)
    store = tracking.open_store(workspace)
    changes: dict[str, str] = {}
    for key, name in named.items():
        try:
            version = tracking.named_version(store, name)
            folder = as_stage(store, version, workspace).directory
        except ValueError as error:
            raise ConfigError(f"models.{key}: {error}") from None
        changes[key] = str(folder / "model")
        changes[f"{key}_revision"] = f"{SCHEME}{version.name}/{version.version}"
    return config.model_copy(update={"models": config.models.model_copy(update=changes)})


def as_stage(store: Store, version: Version, workspace: Path) -> StageRef:
    """A registered version as the input of a stage: as it lies on this machine, else fetched from the store once.

    Its directory holds `model/`, the Hugging Face folder. Raises ValueError where it cannot be had, and for a tag
    `fingerprint` that is none.
    """
    digest, fingerprint = version.tags.get("digest", ""), version.tags.get("fingerprint", "")
    address = urlsplit(version.source)
    folders = [Path(unquote(address.path))] if address.scheme in ("", "file") else []
    made = stages.named(workspace, "ppo", fingerprint) if fingerprint else None
    if made is not None and version.name.endswith(POLICY):
        folders.append(made)  # the average lies there too, in another folder
    for folder in folders:
        if (folder / "model" / "config.json").is_file():
            return StageRef("champion", fingerprint, digest, str(folder), True, 0.0, {})
    fetched = stages.run(copied(version, workspace), lambda folder: tracking.fetch_version(store, version, folder))
    return StageRef("champion", fingerprint, digest, fetched.path, True, 0.0, {})


def copied(version: Version, workspace: Path) -> Stage:
    """The stage that holds a version's files as they were fetched from its store."""
    identity = {"model": version.name, "version": version.version, "digest": version.tags.get("digest", "")}
    return Stage("champion", workspace, identity, {}, ("tasks.tracking.registry",))


def companions(store: Store, policy: Version) -> list[Version]:
    """The versions that follow a policy, as far as they are registered: its reward model, and its moving average."""
    stem = policy.name.removesuffix(POLICY)
    wanted = ((stem + REWARD, policy.tags.get("input.reward.digest")), (stem + EMA, policy.digest))
    found = (
        next((v for v in tracking.versions(store, name) if digest and v.digest == digest), None)
        for name, digest in wanted
    )
    return [version for version in found if version is not None]
