"""Where everything lies on disk: the only module that joins directory names."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config


class Layout:
    """Directories of one configuration. Nothing is created or checked here.

    ::

        shards/<data>/source/                    what a generated source wrote (the embedded world)
        shards/<data>/examples/<split>/          tars, parquet tables, receipts
        shards/<data>/maps/<teacher>/<split>/    one Zarr group per tar, receipts
        runs/<model>/<data>/<arm>-<seed>/        checkpoints, metrics, the exported student
        runs/<model>/<data>/eval/                per-sample results and summary.json (eval-<name>/ for another eval=)
        runs/<model>/<data>/report/              the HTML page and its pictures (report-<name>/)
    """

    def __init__(self, cfg: "Config"):
        self.shards = Path(cfg.shards_dir) / cfg.data.name
        random = "" if cfg.model.weights == "published" else f"-random-{cfg.model.size}"  # never beside real results
        self.runs = Path(cfg.runs_dir) / f"{cfg.model.name}{random}" / cfg.data.name
        self.source_dir = self.shards / "source"
        self.maps_dir = self.shards / "maps" / cfg.teacher.name
        suite = "" if cfg.eval.name == "default" else f"-{cfg.eval.name}"
        self.eval_dir = self.runs / f"eval{suite}"
        self.report_dir = self.runs / f"report{suite}"

    def examples_dir(self, split: str | None = None) -> Path:
        """`examples/<split>`, or the folder that holds every split."""
        return self.shards / "examples" / split if split else self.shards / "examples"

    def maps_split_dir(self, split: str) -> Path:
        """The Zarr groups of one split, one per tar of `examples_dir(split)`."""
        return self.maps_dir / split

    def run_dir(self, arm: str, seed: int) -> Path:
        """The directory of one training run."""
        return self.runs / f"{arm}-{seed}"
