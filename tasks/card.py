"""The model card of a registered model: what it is, what it was made from, how it did. Markdown, from manifests."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.stages import StageRef, read_manifest


def card(title: str, purpose: str, measured: Sequence[tuple[str, Any]], lineage: Mapping[str, StageRef]) -> str:
    """The card as Markdown.

    Args:
        measured: what to say of its quality, name and value.
        lineage: role -> stage that the model comes from, the nearest last.
    """
    lines = [f"# {title}", "", purpose, "", "## Measured", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_text(value)} |" for name, value in measured]
    lines += ["", "## Made from", "", "| | Stage | Fingerprint | Digest | Code |", "|---|---|---|---|---|"]
    lines += [_stage_line(role, ref) for role, ref in lineage.items()]
    return "\n".join(lines) + "\n"


def _stage_line(role: str, ref: StageRef) -> str:
    code = (read_manifest(ref.directory) or {}).get("code", {})
    commit = f"{code['commit'][:10]}{' and changes' if code.get('dirty') else ''}" if "commit" in code else "no commit"
    return f"| {role} | {ref.stage} | {ref.fingerprint} | {ref.digest[:16]} | {commit} |"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
