"""The shell of both pages: styles, scripts, plotly.js and the data, all in one HTML file."""

from __future__ import annotations

import base64
import gzip
import json
import math
import time
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from tune_app.report.words import number

REFRESH_S = 15  # how often the page of a running search reloads itself


def render(
    template: str, plots: Iterable[dict[str, Any]], *, running: bool, hover: Any, **values: Any
) -> str:
    """The template as a string of HTML. `plots` are placed by their `id`; `hover` has the hover
    texts of their points (`hover_texts`)."""
    by_id = {plot["id"]: plot for plot in plots}
    return (
        _environment()
        .get_template(template)
        .render(
            refresh=REFRESH_S if running else None,
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
            plots=by_id,
            data=_json({"plots": list(by_id.values()), "hover": hover}),
            plotly=_plotly(),
            **values,
        )
    )


def _json(data: Any) -> str:
    """JSON that is safe inside a script element: no NaN, and no `<` that could end it."""
    return json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if value is None or value is pd.NA:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        # More than the page shows, less than a float's 17 digits; the tables keep them all.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


@lru_cache(maxsize=1)
def _plotly() -> str:
    """plotly.js, gzipped and in base64: 2 MB instead of 4.8, unpacked by the browser itself."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tune_app.report.page", "assets"),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = files("tune_app.report.page") / "assets"
    environment.globals["css"] = (folder / "page.css").read_text("utf-8")
    environment.globals["js"] = (folder / "page.js").read_text("utf-8")
    environment.filters["number"] = number
    return environment
