"""Settings of a data set."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError

COLUMNS = ("answer", "caption", "conversations", "id", "image", "question")


@dataclass
class DataConfig:
    """Where examples come from and what is accepted.

    Args:
        name: names the folder `shards/<name>`.
        kind: the module of `pipeline.sources` that reads it.
        path: file or folder of the data set, where the kind needs one.
        images: folder that image names are relative to; empty: the folder of `path`.
        splits: file of each split, relative to `path`; empty: all of `path` is `train`, or what the source knows.
        licence: as the data set states it; an example may state its own.
        limit: only the first inputs of every split; 0 takes all.
        shard_size: inputs per tar.
        max_failed: share of inputs that may fail before the stage refuses to go on.
        max_pixels: larger images fail.
        max_chars: longer conversations fail.
        check_images: decode every image completely once; without it only its header is read.
        follow_links: accept symbolic links that lead out of the image folder.
        prompt: the question put before a caption, for sources of captions.
        captions: `first` or `all` captions of an image, each as an example of its own.
        columns: what the columns of a table are called: image, question, answer, caption, conversations, id.
        parts: data sets of a mixture by name, each with settings of its own, a `weight` (1 takes it once) and the
            number of inputs that are `expected` of it (0: not known); another number is told, not refused.
        evaluation: splits, folders or files of images that must not be trained on, compared by content.
        retry_failed: read the inputs again that failed before, and only those.
        sizes: inputs per split, for sources that generate them.
        seed: of the generator, for sources that generate.
    """

    name: str = "world"
    kind: str = "world"
    path: str = ""
    images: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    licence: str = "unknown"
    limit: int = 0
    shard_size: int = 1000
    max_failed: float = 0.01
    max_pixels: int = 64_000_000
    max_chars: int = 100_000
    check_images: bool = True
    follow_links: bool = False
    prompt: str = "Describe the image."
    captions: str = "first"
    columns: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    evaluation: list[str] = field(default_factory=list)
    retry_failed: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for what, names in (("name", [self.name]), ("splits", self.splits), ("sizes", self.sizes)):
            if bad := [name for name in names if name in ("", ".", "..") or "/" in name or "\0" in name]:
                raise UserError(f"data.{what}: '{bad[0]}' cannot name a folder")
        if unknown := sorted(self.columns.keys() - set(COLUMNS)):
            raise UserError(f"data.columns.{unknown[0]}: unknown: a column can be {', '.join(COLUMNS)}")
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}: give 0 or more")
        if not 1 <= self.shard_size <= 100_000:
            raise UserError(f"data.shard_size is {self.shard_size}: give 1 to 100000")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"data.max_failed is {self.max_failed}: give a share from 0 to 1")
        if self.limit < 0:
            raise UserError(f"data.limit is {self.limit}: give 0 (all) or more")
        if self.captions not in ("first", "all"):
            raise UserError(f"data.captions is '{self.captions}': choose first or all")
        if self.max_pixels < 1 or self.max_chars < 1:
            raise UserError("data.max_pixels and data.max_chars must be 1 or more")
