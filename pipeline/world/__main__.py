"""`make world`: train the bundled teacher and student from scratch and write them to pipeline/world/models/.

By its steps some 40 minutes on one core. The student comes out as the bundled one, byte for byte. The bundled teacher
went through earlier forms of `matching.Matching` in 5,900 steps and points better than one made from nothing by the
rounds here (0.86 against 0.58 after 2,400 of their 3,300 steps); docs/log.md tells how.
"""

import argparse
from dataclasses import replace
from pathlib import Path

MODELS = Path(__file__).parent / "models"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.world", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODELS, help="where teacher/ and student/ are written")
    parser.add_argument("--only", choices=("teacher", "student"), help="train one of the two")
    parser.add_argument(
        "--steps", type=int, help="steps of each round of the UNet and of the student, for a quick trial"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = {"steps": args.steps} if args.steps else {}
    if args.only != "teacher":
        from pipeline.world.base import train_base

        train_base(args.out / "student", seed=args.seed, **steps)
    if args.only != "student":
        from pipeline.world.teacher import ROUNDS, train_teacher

        rounds = [replace(part, steps=args.steps) for part in ROUNDS] if args.steps else ROUNDS
        train_teacher(args.out / "teacher", rounds, seed=args.seed)


if __name__ == "__main__":
    main()
