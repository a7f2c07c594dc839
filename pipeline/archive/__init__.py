"""Examples on disk: WebDataset tars with a table of every input and a receipt beside each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.archive.read import Archive as Archive


def __getattr__(name: str):
    # Imported on use: a check whether there is anything to do must not wait for the image and text libraries.
    if name == "Archive":
        from pipeline.archive.read import Archive

        return Archive
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
