"""Model folders come from elsewhere: what they may not hold, since loading it would run their maker's code."""

import hashlib
import json
from pathlib import Path


def check(folder: Path, trusted: bool = False) -> None:
    """Raises ValueError, with the mend, for a Hugging Face folder without safetensors or that needs code of its own.

    A config may name code (auto_map) where transformers knows the architecture too: then that code is left alone.

    Args:
        trusted: a run's config says of this model that its code may run. Code of another repository, which a config can
            name too, may not: nobody has seen it.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights in safetensors format; save the model again in it")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        named = json.dumps(settings.get("auto_map", {}))
        if trusted and "--" in named:
            raise ValueError(f"{file} names code of another repository, which is never run: {named}")
        if not trusted and "auto_map" in settings and not _is_known(settings.get("model_type")):
            raise ValueError(
                f"{file} names code of its own (auto_map), which runs only where a config says so of this one model "
                "(models.policy_trust_remote_code or reward_trust_remote_code); give a model that transformers knows"
            )


def code(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the code in a model folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def _is_known(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # late: it takes a second

    return model_type in CONFIG_MAPPING_NAMES
