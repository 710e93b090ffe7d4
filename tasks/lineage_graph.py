"""A lineage record drawn: data on the left, the model on the right, an arrow from each step to those that read it."""

import html
import io
from collections.abc import Mapping
from typing import Any

from tasks.lineage import Record, facts
from tasks.tracking import Version

COLOURS = {"download": "#dbe7f5", "clean": "#dbe7f5", "base": "#e6e0f3", "reward-base": "#e6e0f3"}
MODEL, OTHER, EDGE, INK = "#d9efe0", "#eef0f4", "#9aa3b0", "#333a45"
INCHES_PER_COLUMN, INCHES_PER_ROW = 1.7, 0.72


def draw(record: Record, form: str = "svg") -> bytes:
    """The graph as an image.

    Args:
        form: "svg", in which text stays text, or "png".
    """
    import networkx
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graph = networkx.DiGraph()
    graph.add_nodes_from(record["steps"])
    graph.add_edges_from((read, name) for name, step in record["steps"].items() for read in step["inputs"].values())
    columns = list(networkx.topological_generations(graph))
    places = {
        name: (column, place - (len(names) - 1) / 2)
        for column, names in enumerate(columns)
        for place, name in enumerate(sorted(names, key=lambda name: _title(record["steps"][name]), reverse=True))
    }
    size = (INCHES_PER_COLUMN * len(columns), INCHES_PER_ROW * max(4, *map(len, columns)))
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=size, dpi=130)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-0.6, len(columns) - 0.4)
        height = max(4, *map(len, columns)) / 2
        axes.set_ylim(-height, height)
        boxes = {
            name: _box(axes, place, record["steps"][name], name == record["root"]) for name, place in places.items()
        }
        figure.draw_without_rendering()  # only then the boxes know where they end
        for read, name in graph.edges:
            _arrow(axes, boxes[read], boxes[name], columns_apart=places[name][0] - places[read][0])
        file = io.BytesIO()
        figure.savefig(file, format=form, facecolor="white")
    return file.getvalue()


def page(record: Record, version: Version) -> str:
    """The graph and what stands behind every step as one HTML file."""
    title = html.escape(f"{version.name} version {version.version}")
    rows = "".join(
        f"<tr><td>{html.escape(step['stage'])}</td><td><code>{html.escape(step['fingerprint'])}</code></td>"
        f"<td>{html.escape(' · '.join(facts(step)))}</td></tr>"
        for step in record["steps"].values()
    )
    picture = draw(record).decode()
    picture = picture[picture.index("<svg") :]  # without the declaration of an XML file
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Lineage of {title}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#333a45}svg{max-width:100%;height:auto}"
        "td{padding:.2rem .8rem .2rem 0;vertical-align:top;border-top:1px solid #e8ebf0}</style>"
        f"<h1>Where {title} came from</h1>{picture}<table>{rows}</table></html>\n"
    )


def _title(step: Mapping[str, Any]) -> str:
    source = step["config"].get("source")
    return f"{step['stage']}\n{_short(source.rpartition('/')[2])}" if source else str(step["stage"])


def _short(text: str, longest: int = 22) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _box(axes: Any, place: tuple[float, float], step: Mapping[str, Any], is_model: bool) -> Any:
    """A step as a box with its name. Returns the text, whose box arrows end at."""
    identity = f"@{step['metrics']['revision'][:10]}" if step["stage"] == "download" else step["fingerprint"][:10]
    colour = MODEL if is_model else COLOURS.get(step["stage"], OTHER)
    return axes.text(
        *place,
        f"{_title(step)}\n{identity}",
        ha="center",
        va="center",
        fontsize=7.5,
        color=INK,
        bbox={"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": EDGE, "linewidth": 0.8},
        zorder=3,
    )


def _arrow(axes: Any, start: Any, end: Any, columns_apart: int) -> None:
    """An arrow between two boxes, bent where it would run through those between them."""
    bend = 0.0 if columns_apart == 1 else -0.28
    style = {
        "arrowstyle": "-|>",
        "color": EDGE,
        "linewidth": 0.9,
        "patchA": start.get_bbox_patch(),
        "patchB": end.get_bbox_patch(),
        "connectionstyle": f"arc3,rad={bend}",
    }
    axes.annotate("", xy=end.get_position(), xytext=start.get_position(), arrowprops=style, zorder=1)
