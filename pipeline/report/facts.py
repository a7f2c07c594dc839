"""What a page says about where its numbers come from: data, maps, runs, evaluation, versions; read from receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.receipts import Receipt

Rows = list[tuple[str, str]]
# Settings of a teacher that people ask about.
TOLD = ("timesteps", "draws", "inversion", "resolutions", "layers", "phrases", "refine", "text", "unit", "dtype")


def groups(cfg: Config, summary: Mapping, details: Mapping) -> list[tuple[str, Rows]]:
    """Titles with rows of (what, value)."""
    found = [
        ("Data", _data(cfg)),
        ("Teacher and its maps", _maps(cfg)),
        ("Evaluation", _evaluation(summary, details)),
        ("Versions", [(name, version) for name, version in details["versions"].items()]),
    ]
    return [(title, rows) for title, rows in found if rows]


def _receipt(path: Path) -> Receipt | None:
    return receipts.load(path) if path.is_file() else None


def _data(cfg: Config) -> Rows:
    found = _receipt(Layout(cfg).examples_dir() / "manifest.json")
    if found is None:
        return []
    counts = found.counts
    rows = [
        ("data set", f"{cfg.data.name}, licence {found.settings.get('licence', 'unknown')}"),
        ("examples", f"{counts['examples']:,} of {counts['inputs']:,} inputs, {_reasons(counts.get('status', {}))}"),
        ("splits", ", ".join(f"{split} {count:,}" for split, count in counts.get("splits", {}).items())),
        ("shards", f"{counts['shards']:,} tars, {counts['image_bytes'] / 1e6:,.1f} MB of images, {_took(found)}"),
    ]
    repeated = counts.get("repeated", {})
    if any(repeated.values()):
        rows.append(("repeated", ", ".join(f"{count:,} {what}" for what, count in repeated.items())))
    return [*rows, ("fingerprint", found.digest[:16])]


def _maps(cfg: Config) -> Rows:
    folder = Layout(cfg).maps_dir
    closed = [receipts.load(path) for path in sorted(folder.glob("*/manifest.json"))]
    rows: Rows = [("teacher", cfg.teacher.name)]
    for found in closed:
        counts = found.counts
        text = f"{counts['words']:,} words of {counts['examples']:,} examples, {_reasons(counts.get('status', {}))}"
        rows.append((f"maps of {found.settings.get('split', '')}".strip(), text))
    if closed:
        settings = closed[0].settings
        rows.append(("settings", "; ".join(f"{key} {setting(settings[key])}" for key in TOLD if key in settings)))
        rows.append(("fingerprint", closed[0].digest[:16]))
    return rows if closed else []


def runs(cfg: Config, jobs: Sequence[Mapping]) -> list[dict]:
    """One row for every trained run: how it was trained, what it saw, and where its losses ended."""
    from pipeline.train.metrics import read

    rows = []
    for job in jobs:
        if not job["arm"] or job["seed"] is None:
            continue
        folder = Layout(cfg).run_dir(job["arm"], job["seed"])
        if cfg.eval.suite and not (folder / "receipt.json").is_file():  # trained elsewhere
            continue
        found, lines = receipts.load(folder / "receipt.json"), read(folder)
        train, arm = found.settings.get("train", {}), found.settings.get("arm", {})
        last = lines[-1] if lines else {}
        rows.append(
            {
                "run": job["name"],
                "arm": job["arm"],
                "method": train.get("method", ""),
                "steps": f"{found.counts.get('steps', last.get('step', 0)):,} × {train.get('batch_size', '?')}",
                "lr": f"{train['lr']:g}" if "lr" in train else "",
                "lambda": f"{arm['lam']:g}" if "lam" in arm else "",
                "targets": arm.get("targets", "none") if arm.get("lam") else "none",
                "examples": f"{found.counts['examples']:,}" if "examples" in found.counts else "",
                "skipped": f"{found.counts['skipped']:,}" if "skipped" in found.counts else "",
                "ce": f"{last['ce']:.3f}" if last.get("ce") is not None else "",
                "align": f"{last['align']:.4f}" if last.get("align") else "",
                "seconds": f"{found.seconds:,.0f}",
                "fingerprint": found.digest[:8],
            }
        )
    return rows


RUN_HEADS = {
    "run": "run",
    "method": "method",
    "steps": "steps × batch",
    "lr": "learning rate",
    "lambda": "λ",
    "targets": "pulled to",
    "examples": "examples",
    "skipped": "skipped",
    "ce": "language loss",
    "align": "alignment loss",
    "seconds": "seconds",
    "fingerprint": "fingerprint",
}


def _evaluation(summary: Mapping, details: Mapping) -> Rows:
    rows: Rows = [("seeds", ", ".join(map(str, summary["seeds"])) or "none")]
    for task, splits in details["tasks"].items():
        count, images = details["questions"][task], details["images"][task]
        rows.append((f"task {task}", f"{count:,} questions about {images:,} images of {', '.join(splits)}"))
    rows += [(f"answers: {key}", setting(value)) for key, value in details["decoding"].items()]
    # An evaluation by an earlier version has the totals only.
    unread = details.get("failures_by_task") or {arm: {"all": found} for arm, found in details["failures"].items()}
    for arm, tasks in unread.items():
        told = (
            f"{task}: {', '.join(f'{count:,} {reason}' for reason, count in found.items())}"
            for task, found in tasks.items()
            if found
        )
        rows.append((f"outputs of {arm} that could not be read", "; ".join(told) or "none"))
    return rows + [(f"seconds: {stage}", f"{seconds:,.0f}") for stage, seconds in summary["seconds"].items()]


def _reasons(status: Mapping[str, int]) -> str:
    other = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in status.items() if name != "ok" and count)
    return other or "all good"


def _took(found: Receipt) -> str:
    return f"{found.seconds:,.0f} s"


def setting(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "all"
    return "default" if value == "" else str(value)
