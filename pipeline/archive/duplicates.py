"""Images that occur twice, and images that are evaluated on and must not be trained on; both by content."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline import receipts
from pipeline.errors import UserError

Image = tuple[str, str]  # the source's name of an example, and the sha256 of its image's bytes


def images(shards: Sequence[Path]) -> list[Image]:
    """Every example that has an image, from the tables beside the shards' receipts."""
    import pyarrow.parquet as pq

    found: list[Image] = []
    for receipt in shards:
        table = pq.read_table(receipt.with_suffix(".parquet"), columns=["id", "sha256"], use_threads=False)
        rows = zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
        found += [(name, sha256) for name, sha256 in rows if sha256]
    return found


def repeated(splits: Mapping[str, Sequence[Image]]) -> dict[str, int]:
    """How many images and names are there more than once, and how many images of other splits are in train too."""
    everything = [sha256 for rows in splits.values() for _, sha256 in rows]
    names = [(split, name) for split, rows in splits.items() for name, _ in rows]
    train = {sha256 for _, sha256 in splits.get("train", [])}
    other = {sha256 for split, rows in splits.items() if split != "train" for _, sha256 in rows}
    return {
        "images": len(everything) - len(set(everything)),
        "ids": len(names) - len(set(names)),
        "trained": len(train & other),
    }


def refuse_evaluation(evaluation: Sequence[str], splits: Mapping[str, Sequence[Image]]) -> None:
    """Checks that none of the images that `evaluation` names is trained on.

    Args:
        evaluation: splits of this data set, and folders, files or tables of shards.

    Raises:
        UserError: some are, or a name does not exist.
    """
    held: set[str] = set()
    for given in evaluation:
        own = splits.get(given) if given != "train" else None
        held.update(_hashes(Path(given).expanduser()) if own is None else (sha256 for _, sha256 in own))
    found = [name for name, sha256 in splits.get("train", []) if sha256 in held]
    if found:
        raise UserError(
            f"{len(found)} image{'s' if len(found) > 1 else ''} of data.evaluation would be trained on"
            f" (first: {found[0]}): take them out of the data set"
        )


def _hashes(path: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    if not path.exists():
        raise UserError(f"data.evaluation: {path} does not exist: give folders or files of images")
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix == ".parquet" and "sha256" in pq.read_schema(file).names:  # a shard's table
            yield from filter(None, pq.read_table(file, columns=["sha256"])["sha256"].to_pylist())
        elif file.is_file():
            yield receipts.file_sha256(file)
