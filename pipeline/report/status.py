"""Whether the report still shows what was evaluated. No matplotlib here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config

RECEIPT = "receipt.json"
PAGE = "index.html"
VERSION = 3  # of the page; a new one is drawn again


def settings(cfg: Config) -> dict:
    """What decides the page beside the evaluation."""
    return {"report": asdict(cfg.report), "version": VERSION}


def inputs(cfg: Config) -> dict[str, str]:
    """The evaluation that is shown.

    Raises:
        UserError: there is none.
    """
    path = Layout(cfg).eval_dir / "receipt.json"
    if not path.is_file():
        raise UserError(f"nothing is evaluated in {path.parent}: run make eval first")
    return {"eval": receipts.load(path).digest}


def up_to_date(cfg: Config) -> bool:
    """Whether the page is whole and shows the newest evaluation. It is drawn in seconds, so it is never refused."""
    path = Layout(cfg).report_dir / RECEIPT
    if not path.is_file() or not (Layout(cfg).eval_dir / "receipt.json").is_file():
        return False
    try:
        receipts.check(path, settings(cfg), inputs(cfg))
    except (receipts.Damaged, receipts.Stale):
        return False
    return True
