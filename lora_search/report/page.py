"""The page: one file of HTML that holds its style, its scripts, the library that draws, and the document.

Nothing of a run is ever read as HTML or as script. The document stands in a data block, in which `<` is escaped; the
scripts show text as text alone; and the page's own Content-Security-Policy lets nothing run but these scripts, by
their hashes, and nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("page")

LIBRARY = PAGE / "vendor" / "echarts.min.js"

SCRIPTS = ("dom", "state", "theme", "chart", "trials", "search", "cost", "table", "main")
"""Files of page/, in the order in which they are read; together one script."""


def page(document: Mapping[str, Any]) -> str:
    """The HTML of a document's page, ASCII but for the library."""
    library = LIBRARY.read_text(encoding="utf-8")
    parts = "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}\n}})();\n'
    style = (PAGE / "report.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    blanks = {
        "{{policy}}": policy,
        "{{style}}": style,
        "{{document}}": embedded(document),
        "{{library}}": library,
        "{{script}}": script,
    }
    html = (PAGE / "report.html").read_text(encoding="utf-8")
    filled = []
    for blank, content in blanks.items():  # in their order on the page: what was filled in is not searched again
        before, _, html = html.partition(blank)
        filled += [before, content]
    return "".join([*filled, html])


def embedded(document: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: ASCII, and no `<`, which could end it."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
