"""Under which licences the data may be used, as far as it is known: for model cards. No legal advice."""

from pathlib import Path

import yaml

UNKNOWN = "unknown"
_HH = "MIT, that of Anthropic/hh-rlhf, whose rows these are; the set itself states none"
LICENCES = {
    "Dahoas/rm-static": _HH,
    "Dahoas/full-hh-rlhf": _HH,
    "yitingxie/rlhf-reward-datasets": _HH,
    "Dahoas/synthetic-instruct-gptj-pairwise": UNKNOWN,
    "openai/webgpt_comparisons": UNKNOWN,
    "stanfordnlp/SHP": f"{UNKNOWN} (posts of Reddit)",
}
"""Set of the hub -> its licence."""


def of_set(name: str, stated: str | None) -> str:
    """The licence that a config states for a set, else the one that is known of it."""
    return stated or LICENCES.get(name, UNKNOWN)


def of_model(folder: Path) -> str:
    """The licence in the head of a model folder's card, as the hub's cards have it."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8").split("---")[1:2] if card.is_file() else []
    try:
        settings = yaml.safe_load(head[0]) if head else None
    except yaml.YAMLError:
        settings = None
    return str(settings.get("license", UNKNOWN)) if isinstance(settings, dict) else UNKNOWN
