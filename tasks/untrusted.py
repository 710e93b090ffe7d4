"""Model folders come from elsewhere: what they may not hold, since loading it would run their maker's code."""

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check(folder: Path, trusted: bool = False) -> None:
    """Raises ValueError, with the mend, for a Hugging Face folder that needs pickled weights or code of its own.

    A config may name code (auto_map) where transformers knows the architecture too: then that code is left alone.

    Args:
        trusted: a run's config says of this model that its code may run. Code of another repository, which a config can
            name too, may not: nobody has seen it.
    """
    check_weights(folder)
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        settings = _read(file)
        named = json.dumps(settings.get("auto_map", {}))
        if trusted and "--" in named:
            raise ValueError(f"{file} names code of another repository, which is never run: {named}")
        if not trusted and "auto_map" in settings and not _is_known(settings.get("model_type")):
            raise ValueError(
                f"{file} names code of its own (auto_map), which runs only where a config says so of this one model "
                "(models.policy_trust_remote_code or reward_trust_remote_code); give a model that transformers knows"
            )


def check_weights(folder: Path) -> None:
    """Raises ValueError, with the mend, for a model folder whose weights transformers would not read from safetensors.

    It takes the file that the config names, else model.safetensors, else the shards of its index, and pickled weights
    beside them are left alone. Without these it takes the pickled ones, and so it does, even where it is told to use
    safetensors, with shards of that format and with an adapter's weights.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json); merge it into its model and save that")
    named = _read(folder / "config.json").get("transformers_weights")
    name = named or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    if not (folder / name).is_file():
        raise ValueError(f"{folder} holds no weights in safetensors format; save the model again in it")
    shards = _read(folder / name).get("weight_map", {}).values() if name.endswith(".json") else ()
    for file in shards or [name]:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder} names {file} as weights, no safetensors file in it; save the model again")


def code(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the code in a model folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def _read(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings


def _is_known(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # late: it takes a second

    return model_type in CONFIG_MAPPING_NAMES
