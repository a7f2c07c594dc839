"""Tables by row number, a few rows in memory at a time: parquet, Arrow as `datasets` saves it, JSON, CSV and TSV."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources.base import Failure
from pipeline.sources.jsonstream import Index, build_index, records

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv", ".json")
_ROWS = 32
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def count_rows(path: Path) -> int:
    """Rows of a table; of JSON lines the broken ones too.

    Raises:
        UserError: the file cannot be read as what its name says.
    """
    if path.suffix in (".json", ".jsonl"):
        return _index(path).count
    if path.suffix == ".arrow":
        return sum(batch.num_rows for batch in _arrow_batches(path))
    if path.suffix in _SEPARATORS:
        return sum(batch.num_rows for batch in _csv_batches(path))
    return _parquet(path).metadata.num_rows


def read_rows(
    path: Path, start: int, stop: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Failure]]:
    """Rows `start:stop` with their numbers; of `columns` those that the file has. A broken line of JSON lines comes as
    a Failure."""
    if start >= stop:
        return
    if path.suffix in (".json", ".jsonl"):
        for number, row in records(path, _index(path), start, stop):
            good = isinstance(row, (dict, Failure))
            yield number, row if good else Failure("bad_record", f"a JSON {type(row).__name__}, not an object")
    elif path.suffix == ".arrow":
        yield from _part(_arrow_batches(path), 0, start, stop)
    elif path.suffix in _SEPARATORS:
        yield from _part(_csv_batches(path), 0, start, stop)
    else:
        yield from _parquet_rows(path, start, stop, columns)


def column_names(path: Path) -> list[str]:
    """Names of the columns; of JSON those of the first hundred records."""
    if path.suffix in (".json", ".jsonl"):
        return list(dict.fromkeys(name for _, row in read_rows(path, 0, 100) if isinstance(row, dict) for name in row))
    if path.suffix == ".arrow":
        return next((batch.schema.names for batch in _arrow_batches(path)), [])
    return _header(path) if path.suffix in _SEPARATORS else _parquet(path).schema_arrow.names


def _part(batches: Iterator, number: int, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows `start:stop` of record batches, of which the first row has a number."""
    for batch in batches:
        low, high = max(start - number, 0), min(stop - number, batch.num_rows)
        for first in range(low, high, _ROWS):  # a batch may hold thousands of images
            yield from enumerate(batch.slice(first, min(_ROWS, high - first)).to_pylist(), number + first)
        number += batch.num_rows
        if number >= stop:
            return


def _parquet_rows(path: Path, start: int, stop: int, columns: Sequence[str] | None) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa

    file = _parquet(path)
    wanted = [name for name in columns if name in file.schema_arrow.names] if columns else None
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first + count > start and first < stop:
            try:
                batches = file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False)
                yield from _part(batches, first, start, stop)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _unreadable(path, f"parquet (rows {first} to {first + count - 1})", error) from error
        first += count


def _parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, "parquet", error) from error


def _arrow_batches(path: Path) -> Iterator:
    """Record batches of a stream (what `Dataset.save_to_disk` writes) or of a file, mapped and not loaded."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path))
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _csv_batches(path: Path) -> Iterator:
    """Record batches of text: what a column means is for the mapping to say, so "007" stays as it is."""
    import pyarrow as pa
    from pyarrow import csv

    types = dict.fromkeys(_header(path), pa.string())
    try:
        yield from csv.open_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(delimiter=_SEPARATORS[path.suffix], newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, path.suffix[1:].upper(), error) from error


def _header(path: Path) -> list[str]:
    import csv

    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            return next(csv.reader(handle, delimiter=_SEPARATORS[path.suffix]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, path.suffix[1:].upper(), error) from error


def _index(path: Path) -> Index:
    stat = path.stat()
    return _index_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _index_of(path: Path, size: int, time_ns: int) -> Index:
    return build_index(path)


def _unreadable(path: Path, what: str, error: Exception) -> UserError:
    return UserError(f"{path}: is not a readable {what} file: {str(error).partition(chr(10))[0]}")
