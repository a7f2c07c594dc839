"""Reads one example of the archive; prints what a student learns of it and writes a picture of where it looks.

python -m stages.inspect [index=0] [split=train] [data=... model=... model.path=...], or DATA=... MODEL=... as for make
"""

import sys

from stages.cli import guarded, lowered, usage


def main() -> int:
    given = lowered(sys.argv[1:])
    if {"-h", "--help"} & set(given):
        print(usage(__doc__))
        return 0
    return guarded(lambda: show(given))


def show(given: list[str]) -> None:
    """Composes the settings, loads the student and shows the example."""
    from pipeline.config import compose
    from pipeline.errors import UserError
    from pipeline.layout import Layout

    own = {"index": "0", "split": "train"}
    own |= {word.partition("=")[0]: word.partition("=")[2] for word in given if word.partition("=")[0] in own}
    cfg = compose([word for word in given if word.partition("=")[0] not in own])
    if not own["index"].isdecimal():
        raise UserError(f"index={own['index']}: give the number of an example, from 0")
    layout = Layout(cfg)

    from pipeline.archive.read import Archive
    from pipeline.student.batch import EncodeError
    from pipeline.student.inspect import inspect
    from pipeline.student.load import load_student

    archive = Archive(layout.examples_dir(own["split"]))
    index = int(own["index"])
    if index >= len(archive):
        raise UserError(f"index={index}: the split {own['split']} has {len(archive)} examples")
    student = load_student(cfg.model, cfg.align)
    try:
        lines = inspect(student, archive[index], layout.runs / "inspect", f"{own['split']}-{index}")
    except EncodeError as error:
        raise UserError(f"{archive[index].key}: this student cannot take it: {error}") from error
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
