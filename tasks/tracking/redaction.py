"""What may be written down of a config: no secret, no password in an address, and only names that MLflow takes."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.config import SECRET

LONGEST_VALUE = 500


def redacted(tree: Any) -> Any:
    """A config tree without the values of keys that look like secrets and without credentials in addresses."""
    if isinstance(tree, Mapping):
        # "max_prompt_tokens" is a number, no secret: only text can be one.
        return {
            key: "***" if isinstance(value, str) and SECRET.search(str(key)) else redacted(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return without_credentials(tree) if isinstance(tree, str) else tree


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key -> text of every value of a tree; a list is one value, and long values are cut."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = tree if isinstance(tree, str) else json.dumps(tree)
        yield prefix, text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def without_credentials(text: str) -> str:
    """A text without the user and password of addresses in it."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)


def allowed(name: str) -> str:
    """A name that MLflow takes for a metric, param or tag."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
