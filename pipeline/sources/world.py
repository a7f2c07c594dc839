"""The embedded world: drawn once to disk in LLaVA's form under a receipt, then read like any other such data set."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.sources.config import DataConfig
from pipeline.sources.llava_json import LlavaJson

if TYPE_CHECKING:
    from pipeline.layout import Layout


def open_source(data: DataConfig, layout: "Layout") -> "World":
    """Draws the scenes if `layout.source_dir` does not hold them, and opens them."""
    if not data.sizes:
        raise UserError("data.kind=world needs data.sizes, for example data.sizes.train=1000")
    from pipeline.world.dataset import VERSION

    folder = Path(layout.source_dir)
    settings = {"sizes": data.sizes, "seed": data.seed, "version": VERSION}
    receipt = folder.with_name(f"{folder.name}.json")
    # The scenes are a pure function of their settings, and cheap: other settings redraw them, and it is the
    # archive made from them that then refuses to be mixed up.
    if not receipts.is_current(receipt, settings, overwrite=True):
        _draw(folder, receipt, settings)
    return World(
        files={split: [folder / f"{split}.json"] for split in data.sizes},
        root=folder,
        identity=receipts.load(receipt).digest,
    )


def _draw(folder: Path, receipt: Path, settings: dict) -> None:
    from pipeline.world.dataset import write_world

    start = time.monotonic()
    with receipts.hold(folder.parent):
        tmp = folder.with_name(f".{folder.name}.tmp")
        write_world(tmp, settings["sizes"], settings["seed"])
        receipt.unlink(missing_ok=True)
        receipts.commit_dir(tmp, folder)
        receipts.write(
            receipt,
            stage="world",
            settings=settings,
            files=[folder],
            counts=settings["sizes"],
            seconds=time.monotonic() - start,
            durable=True,
        )


@dataclass
class World(LlavaJson):
    """The drawn scenes; the receipt vouches for every picture, so it stands for the content."""

    identity: str = ""

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        return {"world": self.identity}
