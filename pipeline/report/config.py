"""Settings of the report."""

from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass
class ReportConfig:
    """What the page shows.

    Args:
        name: the name of this layout.
        words: words in the gallery.
        title: heading of the page; empty composes one from model and data.
        arms: at most this many arms beside the base have a column of maps in the gallery.
        look: where the evaluation could measure no words (data without regions), load the students and the teacher and
            read maps of some; false leaves the gallery out.
    """

    name: str = "default"
    words: int = 24
    title: str = ""
    arms: int = 2
    look: bool = True

    def __post_init__(self) -> None:
        if self.words < 0 or self.arms < 1:
            raise UserError("report.words must be 0 or more and report.arms at least 1")
