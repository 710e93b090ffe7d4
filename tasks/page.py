"""HTML pages that need nothing else: the templates of `tasks/pages/` filled in, to be opened, mailed or kept.

Autoescaping is on, since prompts and answers are other people's text.
"""

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("pages")


def render(template: str, **values: Any) -> str:
    """A template of `tasks/pages/` with its values; `written` is the time."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not needed until a run ends

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"duration": duration, "embedded": embedded}
    return environment.get_template(template).render(
        written=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"), **values
    )


def embedded(png: bytes) -> str:
    """The address of an image that needs no server to be fetched from."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def duration(seconds: float) -> str:
    """A time as people say it: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(share: float) -> str:
    """A share in percent, with one digit."""
    return f"{share * 100:.1f} %"
