"""Data sets as the shard stage reads them: one module per source, each a class `Source` with the same few methods."""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.layout import Layout
    from pipeline.sources.base import Source
    from pipeline.sources.config import DataConfig

KINDS = (
    "easy_vqa", "flickr30k", "flickr30k_entities", "hf", "laion", "llava_json", "mixture", "ocrvqa", "pope", "rlaif_v",
    "webdataset", "world", "worldmedqa",
)  # fmt: skip


def open_source(data: "DataConfig", layout: "Layout") -> "Source":
    """The source that `data.kind` names.

    Raises:
        UserError: unknown kind, or the data is not where the settings say.
    """
    if data.kind not in KINDS:
        raise UserError(f"unknown data.kind '{data.kind}': choose one of {', '.join(KINDS)}")
    return import_module(f"pipeline.sources.{data.kind}").open_source(data, layout)
