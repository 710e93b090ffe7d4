"""Model folders come from elsewhere: what they may not hold, since loading it would run their maker's code."""

import json
from pathlib import Path


def check(folder: Path) -> None:
    """Raises ValueError, with the mend, for a Hugging Face folder without safetensors or that needs code of its own.

    A config may name code (auto_map) where transformers knows the architecture too: then that code is left alone.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights in safetensors format; save the model again in it")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "auto_map" in settings and not _is_known(settings.get("model_type")):
            raise ValueError(
                f"{file} names code of its own (auto_map), which is never run; give a model that transformers knows"
            )


def _is_known(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # late: it takes a second

    return model_type in CONFIG_MAPPING_NAMES
