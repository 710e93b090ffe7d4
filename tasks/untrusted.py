"""Model folders come from elsewhere: what they may not hold, since loading it would run their maker's code."""

import json
from pathlib import Path


def check(folder: Path) -> None:
    """Raises ValueError, with the mend, for a Hugging Face folder without safetensors or with code of its own."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights in safetensors format; save the model again in it")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise ValueError(
                f"{file} names code of its own (auto_map), which is never run; give a model that transformers knows, "
                "or take auto_map out if transformers has its architecture"
            )
