"""Checks every cached byte against its receipt, names what is damaged, and rebuilds only that.

It walks the folders rather than trusting the manifests: a shard whose receipt is gone is found as well.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config

_RECEIPT = re.compile(r"\d{5}\.json|manifest\.json|receipt\.json")
_SHARD = re.compile(r"\d{5}\.(tar|parquet|zarr)")


@dataclass
class Finding:
    """What a full check of a folder found: receipts looked at, and every damage by the receipt it belongs to."""

    receipts: int = 0
    bytes: int = 0
    damaged: dict[Path, list[str]] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """One line per damage."""
        return [line for lines in self.damaged.values() for line in lines]


def examine(folder: Path) -> Finding:
    """A full check of everything below a folder: each receipt's own hash, its files' hashes, its children's digests."""
    finding = Finding()
    for path in _receipts(folder):
        finding.receipts += 1
        try:
            receipt = receipts.load(path)
            found = receipts.damages(path)
            found += _children(receipt)
            finding.bytes += sum(entry.size for entry in receipt.files.values())
        except receipts.Damaged as error:
            found = [str(error).partition(": run the stage")[0]]
        if found:
            finding.damaged[path] = found
    for path in sorted(folder.rglob("*")):
        if _SHARD.fullmatch(path.name) and not path.with_suffix(".json").exists():
            line = f"{path}: has no receipt, so nothing says that it is whole"
            finding.damaged.setdefault(path.with_suffix(".json"), []).append(line)
    return finding


def _receipts(folder: Path) -> Iterator[Path]:
    return (
        path for path in sorted(folder.rglob("*.json")) if _RECEIPT.fullmatch(path.name) and not _inside(path, folder)
    )


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in an artefact below `folder`, which has its receipt outside."""
    return any(parent.suffix == ".zarr" for parent in path.relative_to(folder).parents)


def _children(receipt: receipts.Receipt) -> list[str]:
    found = []
    for name, digest in receipt.children.items():
        path = receipt.path.parent / name
        if not path.exists():
            found.append(f"{path}: is missing")
            continue
        try:
            if receipts.load(path).digest != digest:
                found.append(f"{path}: is not the one that {receipt.path} vouches for")
        except receipts.Damaged:
            continue  # reported where it lies
    return found


def verify(cfg: "Config") -> Finding:
    """Checks the shards, maps and runs of `cfg.data` in full.

    Raises:
        UserError: something is damaged; each damage has been printed.
    """
    finding = _report(cfg)
    if finding.damaged:
        raise UserError(
            f"{len(finding.lines)} damaged or unproven in {len(finding.damaged)} places (named above):"
            " run make verify ARGS=repair=true to rebuild only those"
        )
    return finding


def repair(cfg: "Config") -> Finding:
    """As `verify`, then rebuilds damaged shards and maps; runs are named only, since training again is no repair.

    Raises:
        UserError: what is left to do by hand.
    """
    finding = _report(cfg)
    layout = Layout(cfg)
    for path in finding.damaged:
        path.unlink(missing_ok=True)  # without its receipt a stage does the piece again, and only that piece
    places = list(finding.damaged)
    if any(path.is_relative_to(layout.examples_dir()) for path in places):
        from pipeline.archive.stage import shard

        shard(cfg)
    if any(path.is_relative_to(layout.maps_dir) for path in places):
        from pipeline.teacher.stage import precompute

        precompute(cfg)
    left = [path for path in places if not path.exists()]
    if left:
        raise UserError(
            f"{left[0]} (and {len(left) - 1} more) was made by another teacher or by a run:"
            f" run its stage again with the settings it was made with"
        )
    return finding


def _report(cfg: "Config") -> Finding:
    layout = Layout(cfg)
    folders = [folder for folder in (layout.examples_dir(), layout.shards / "maps", layout.runs) if folder.is_dir()]
    if not folders:
        raise UserError(f"{layout.shards}: there is nothing to verify: run make shard first")
    total = Finding()
    for folder in folders:
        finding = examine(folder)
        for line in finding.lines:
            print(line)
        total.receipts += finding.receipts
        total.bytes += finding.bytes
        total.damaged |= finding.damaged
    print(f"verify: {total.receipts} receipts, {total.bytes / 1e6:.1f} MB, {len(total.lines)} damaged")
    return total
