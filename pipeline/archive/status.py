"""What the shard stage would do, without doing it: settings, plan, and whether its output is up to date. Light."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts
from pipeline.layout import Layout
from pipeline.sources import open_source

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.sources.base import Source

MANIFEST = "manifest.json"
# Settings by which a kind of source turns what it finds into conversations.
READING = {
    "flickr30k": ("prompt", "captions"),
    "flickr30k_entities": ("prompt", "captions"),
    "hf": ("prompt", "columns"),
    "laion": ("prompt",),
    "mixture": ("prompt", "captions", "parts"),
    "rlaif_v": ("columns",),
    "webdataset": ("prompt", "columns"),
}


def settings(cfg: "Config") -> dict[str, Any]:
    """Every setting that decides the bytes of the shards."""
    data = cfg.data
    return {
        "source": data.name,
        "licence": data.licence,
        "shard_size": data.shard_size,
        "limit": data.limit,
        "max_pixels": data.max_pixels,
        "max_chars": data.max_chars,
        "check_images": data.check_images,
        "follow_links": data.follow_links,
        **({"reading": {name: getattr(data, name) for name in READING[data.kind]}} if data.kind in READING else {}),
    }


def inputs(source: "Source", layout: Layout) -> dict[str, str]:
    """What identifies the content of the source."""
    folder = layout.examples_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return source.fingerprint(folder / "source.json")


def manifest(cfg: "Config") -> Path:
    """The receipt that closes the stage and vouches for every split."""
    return Layout(cfg).examples_dir() / MANIFEST


def up_to_date(cfg: "Config") -> bool:
    """Whether the shards of `cfg.data` are whole and made with these settings (a quick check).

    Raises:
        Stale: they were made with other settings (unless `cfg.overwrite`).
        UserError: the source is not there.
    """
    path = manifest(cfg)
    if not path.exists():
        return False
    layout = Layout(cfg)
    found = inputs(open_source(cfg.data, layout), layout)
    if not receipts.is_current(path, settings(cfg), found, overwrite=cfg.overwrite):
        return False
    counts = receipts.load(path).counts
    if cfg.data.retry_failed and counts["failed"]:
        return False
    return counts.get("evaluation", []) == list(cfg.data.evaluation)
