"""Parquet files read by row number, a few rows in memory at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_ROWS = 32


def count_rows(path: Path) -> int:
    """Rows of a parquet file.

    Raises:
        UserError: it is not one.
    """
    return _open(path).metadata.num_rows


def read_rows(
    path: Path, start: int, stop: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows `start:stop` with their numbers; of `columns` those that the file has."""
    if start >= stop:
        return
    file = _open(path)
    wanted = [name for name in columns if name in file.schema_arrow.names] if columns else None
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first + count > start and first < stop:
            number = first
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                low, high = max(start - number, 0), min(stop - number, len(batch))
                if low < high:
                    yield from enumerate(batch.slice(low, high - low).to_pylist(), number + low)
                number += len(batch)
        first += count


def column_names(path: Path) -> list[str]:
    """Names of the columns of a parquet file."""
    return _open(path).schema_arrow.names


def _open(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file: {str(error).partition(chr(10))[0]}") from error
