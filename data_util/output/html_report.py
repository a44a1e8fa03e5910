"""report.html: a registration to look at in a browser, slice by slice, in one file that needs nothing else."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_util.output.quality import Quality
from data_util.scans.frame import Frame
from files import write_text

TEMPLATE = Path(__file__).with_name("report.html")
MAP_STEP = 2  # every how many voxels a map is kept, along each axis
LEAST_MM = 1.0  # what the brightest colour of a map in mm stands for at least


def write_html(
    path: str | Path, volumes: dict[str, np.ndarray], quality: Quality, frame: Frame, report: dict[str, Any]
) -> None:
    """Write the page of a registration.

    Args:
        path: the file.
        volumes: 'fixed', 'moving' and 'warped' [X, Y, Z], 0..255, in LPS.
        quality: maps on the same grid, in LPS.
        frame: of the fixed volume.
        report: what report.json holds.

    Raises:
        UserError: it cannot be written.
    """
    maps = {
        "before": (quality.before, -1.0, 1.0),
        "after": (quality.after, -1.0, 1.0),
        "moved": (quality.moved, 0.0, max(float(quality.moved.max()), LEAST_MM)),
        "residual": (quality.residual, 0.0, max(float(quality.residual.max()), LEAST_MM)),
    }
    if quality.apart is not None:
        maps["apart"] = (quality.apart, 0.0, max(float(quality.apart.max()), LEAST_MM))
    shown = {name: _packed(volume, 1, 0, 255) for name, volume in volumes.items()}
    shown |= {name: _packed(values, MAP_STEP, *ends) for name, (values, *ends) in maps.items()}
    data = {
        "size": list(volumes["fixed"].shape),
        "spacing": [abs(float(mm)) for mm in frame.spacing],
        "volumes": shown,
        "ranges": {name: ends for name, (_, *ends) in maps.items()},
        "tables": _tables(report),
        "doubts": report["doubts"],
        "chosen": report["chosen"],
    }
    names = [html.escape(Path(report["settings"][role] or role).name) for role in ("fixed", "moving")]
    page = TEMPLATE.read_text(encoding="utf-8").replace("$TITLE", f"{names[1]} registered to {names[0]}")
    write_text(path, page.replace("$DATA", json.dumps(data).replace("<", "\\u003c")))


def _packed(volume: np.ndarray, step: int, low: float, high: float) -> dict[str, Any]:
    """A volume as a picture of all its axial slices: 1 to 255 for low to high, 0 for NaN."""
    volume = volume[::step, ::step, ::step]
    scaled = np.clip((volume.astype(np.float32) - low) / (high - low), 0, 1) * 254 + 1
    grey = np.where(np.isnan(scaled), 0, scaled).round().astype(np.uint8)
    columns = int(np.ceil(np.sqrt(grey.shape[2])))
    rows = -(-grey.shape[2] // columns)
    sheet = np.zeros((rows * columns, grey.shape[1], grey.shape[0]), np.uint8)
    sheet[: grey.shape[2]] = grey.transpose(2, 1, 0)
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    file = io.BytesIO()
    Image.fromarray(sheet.reshape(rows * grey.shape[1], columns * grey.shape[0])).save(file, "PNG", compress_level=3)
    picture = base64.b64encode(file.getvalue()).decode()
    return {"size": list(grey.shape), "step": step, "columns": columns, "png": picture}


def _tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page tells in tables: a title, heads and rows each."""
    count = len(report["similarity"])
    stages = ["before", *(f"stage {k}" for k in range(1, count - 1)), "result"][-count:]
    rows = [
        [stage, f"{similarity:.4f}", f"{100 * folding:.3f}"]
        for stage, similarity, folding in zip(stages, report["similarity"], report["folding"], strict=True)
    ]
    seconds = [[step, f"{value:.2f}"] for step, value in report["seconds"].items()]
    settings = [
        [name, value if isinstance(value, str) else json.dumps(value)]
        for name, value in report["settings"].items()
        if value is not None
    ]
    worst = sorted(
        (region for region in report["quality"]["regions"] if region["after"] is not None), key=lambda r: r["after"]
    )[:8]
    regions = [[" ".join(map(str, r["region"])), f"{r['before']:.3f}", f"{r['after']:.3f}"] for r in worst]
    return [
        {"title": "Similarity", "heads": ["", "correlation", "folding %"], "rows": rows},
        {"title": "Least alike regions (right-left, front-back, feet-head, of 4 each)",
         "heads": ["region", "before", "after"], "rows": regions},
        {"title": "Seconds", "heads": ["step", "s"], "rows": seconds},
        {"title": "Settings", "heads": ["", ""], "rows": settings},
    ]  # fmt: skip
