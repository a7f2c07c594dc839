"""Reads settings, receipts, one model's shapes and some examples; prints a table of what a training run needs.

python -m stages.doctor [gpu=a100-80gb] [gpus=8] [data=... model=... train=...]
"""

import sys

from stages.cli import guarded, usage


def main() -> int:
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(usage(__doc__))
        return 0
    return guarded(lambda: show(given))


def show(given: list[str]) -> None:
    """Composes the settings and runs the preflight."""
    from pipeline.config import compose
    from pipeline.errors import UserError

    own = {"gpu": "", "gpus": "0"}
    own |= {word.partition("=")[0]: word.partition("=")[2] for word in given if word.partition("=")[0] in own}
    cfg = compose([word for word in given if word.partition("=")[0] not in own])
    if not own["gpus"].isdecimal():
        raise UserError(f"gpus={own['gpus']}: give a number of GPUs")

    from pipeline.doctor.stage import doctor

    doctor(cfg, own["gpu"], int(own["gpus"]))


if __name__ == "__main__":
    sys.exit(main())
