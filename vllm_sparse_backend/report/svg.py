"""The look of all pictures, and how one gets into a page or a file."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend.options import Refused

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Readable on white and on near-black; the page's own text colour takes the place of INK.
DENSE, SPARSE, INK = "#8a8f98", "#d9602b", "#123456"
FORMATS = (".svg", ".png")


def look(name: str) -> dict[str, Any]:
    """matplotlib's settings, for `rc_context`; `name` makes the picture's ids its own."""
    return {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": name,  # the same ids every time
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # a name with two dollar signs is no formula
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def inline(figure: Figure, name: str, title: str) -> str:
    """One `<svg>` element without the prologue and the metadata, which name sites; scaled by the
    page, and read out as `title`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(look(name)):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    style = f"max-width: {float(width[1]) * 4 / 3:.0f}px" if width else ""
    label = escape(title, quote=True).replace("\\", r"\\")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        rf'<svg role="img" aria-label="{label}" style="{style}" \1width="100%"',
        svg,
        count=1,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a picture, SVG or PNG by its name, on white. Raises Refused if it cannot be."""
    from matplotlib import rc_context

    check(path)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with rc_context(look(path.stem)):
            figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)
    except OSError as error:
        raise Refused(f"-o {path}: {error.strerror}") from None


def check(path: Path) -> None:
    """Raise Refused for a name that says no format we write, or a folder that is not there."""
    if path.suffix.lower() not in FORMATS:
        raise Refused(f"-o {path}: want a name ending in .svg or .png")
    if not path.parent.is_dir():
        raise Refused(f"-o {path}: there is no folder {path.parent}")
