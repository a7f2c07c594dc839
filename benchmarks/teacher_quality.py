"""Where do the teacher's maps point? Settings are chosen on one labelled split and reported on another.

    python -m benchmarks.teacher_quality data=world teacher=tiny
    python -m benchmarks.teacher_quality data=flickr30k_entities teacher=sd14 --limit 200 --inversions ddim:50 ...

Any data set whose examples carry `meta.regions` will do (shard it first), and any teacher. The sweep goes one axis at a
time: phrases, timesteps, grids and their weights, layers, renormalisation, refinement, several timesteps and draws,
inversions. Each axis starts from the best value so far by the mean of pointing game and mIoU on `val`; an axis that
costs more forwards is tried last. What is reported on `test`: the plain mean over all layers, the settings of the
configured teacher, `fast` (the best of one forward) and `best`. The threshold of mIoU is chosen on `val` for each
setting. A word that the teacher has no window for counts as a miss. Intervals are over images (95%, bootstrap); on
`test` each setting is also compared with the plain mean, word by word. `--json FILE` is written after every setting, so
that nothing measured is lost; `--document docs/teacher.md` writes the tables there from it, without measuring:

    python -m benchmarks.teacher_quality --json results/teacher_quality.json --document docs/teacher.md
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.align.words import is_content
from pipeline.archive.read import Archive
from pipeline.config import Config, compose
from pipeline.errors import UserError
from pipeline.evaluate.intervals import mean_interval, paired
from pipeline.evaluate.pointing import THRESHOLDS, Pointing, best_threshold, measure, word_region
from pipeline.examples import Example, decode
from pipeline.layout import Layout
from pipeline.teacher.config import MAP_SIDE, TeacherConfig
from pipeline.teacher.extract import Item, load_teacher
from pipeline.teacher.load import device_of, load_adapter
from pipeline.teacher.noise import image_seed
from pipeline.teacher.windows import teacher_texts

PLAIN = {"resolutions": [], "resolution_weights": [], "layers": "", "renormalise": False, "refine": 0, "draws": 1,
         "phrases": "none", "refine_resolution": 0, "inversion": "none"}  # fmt: skip
BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"  # what `--document` writes between
SWEPT = (*PLAIN, "timesteps", "inversion_steps", "inner_steps")  # what a setting consists of
STRESS = 0.7  # share of the stressed grid where grids are weighed; the others share the rest


@dataclass(frozen=True)
class Word:
    """A word or phrase with a known region: its image, kind (colour, shape, ...) and role, and how its map did."""

    image: str
    kind: str
    role: str
    found: Pointing


def labelled(archive: Archive, limit: int) -> Iterator[Example]:
    """The first `limit` examples (0 for all) that have an image and regions."""
    count = 0
    for example in archive:
        if example.image and example.meta.get("regions"):
            yield example
            count += 1
            if count == limit:
                return


def words(cfg: TeacherConfig, examples: Sequence[Example]) -> list[Word]:
    """Every word or phrase of the examples that has a region, with its map under these settings. The map of a phrase is
    the mean over its words, each scaled to [0, 1]; articles and the like are left out."""
    teacher = load_teacher(cfg, device_of(cfg))
    order = []

    def items() -> Iterator[Item]:
        for example in examples:
            image = decode(example.image)
            seed = image_seed(cfg.seed, example.image)
            for text in teacher_texts(example, cfg.text, cfg.phrases):
                order.append((example, image.size[::-1]))
                yield Item(image, seed, seed, text, example.key)

    out = []
    for number, found in enumerate(teacher.read(items())):
        example, size = order[number]
        regions = example.meta["regions"]
        for turn, start, end in sorted({(region["turn"], region["start"], region["end"]) for region in regions}):
            inside = [n for n, w in enumerate(found.words) if w.turn == turn and start <= w.start and w.end <= end]
            said = example.turns[turn].text
            inside = [n for n in inside if is_content(said[found.words[n].start : found.words[n].end])] or inside
            region = word_region(regions, turn, start, end, size) if inside else None
            if region:
                map_YX = np.mean([scaled(found.maps[n]) for n in inside], axis=0)
                kind = region[1] or "word"
                out.append(Word(example.key, kind, example.turns[turn].role, measure(map_YX, region[0])))
    if not out:
        raise UserError("no word of these examples has a region: choose data with meta.regions")
    return out


def scaled(map_YX: np.ndarray) -> np.ndarray:
    """A map from 0 to 1, a constant one as zeros."""
    low, high = float(map_YX.min()), float(map_YX.max())
    return (map_YX - low) / (high - low) if high > low else np.zeros_like(map_YX)


def row(name: str, cfg: TeacherConfig, found: list[Word], threshold: float, seconds: float) -> dict:
    """One line of the table: pointing game and mIoU overall, pointing by kind and role, and what chance would give."""
    column = THRESHOLDS.index(threshold)
    images = [word.image for word in found]
    pointing = mean_interval([word.found.hit for word in found], images)
    miou = mean_interval([word.found.ious[column] for word in found], images)
    groups = {
        **{kind: [w for w in found if w.kind == kind] for kind in sorted({w.kind for w in found})},
        **{role: [w for w in found if w.role == role] for role in ("user", "assistant")},
    }
    by_group = {}
    for group, members in groups.items():
        if members:
            interval = mean_interval([w.found.hit for w in members], [w.image for w in members])
            by_group[group] = {"pointing": round(interval.value, 4), "ci95": interval.ci95, "n": interval.n}
    return {
        "setting": name,
        "options": {key: getattr(cfg, key) for key in SWEPT},
        "nfe": cfg.forwards,
        "pointing": round(pointing.value, 4),
        "pointing_ci95": pointing.ci95,
        "miou": round(miou.value, 4),
        "miou_ci95": miou.ci95,
        "threshold": threshold,
        "chance": round(float(np.mean([w.found.area for w in found])), 4),
        "centre": round(float(np.mean([w.found.centre for w in found])), 4),
        "n": len(found),
        "images": len(set(images)),
        "by": by_group,
        "seconds": round(seconds, 1),
    }


def over(found: list[Word], threshold: float, reference: list[Word], other: float) -> dict:
    """How much better than a reference on the same words, in pointing game and mIoU, each at its own threshold."""
    images = [word.image for word in found]
    assert images == [word.image for word in reference]
    column, second = THRESHOLDS.index(threshold), THRESHOLDS.index(other)
    out = {}
    for name, ours, theirs in (
        ("pointing", [w.found.hit for w in found], [w.found.hit for w in reference]),
        ("miou", [w.found.ious[column] for w in found], [w.found.ious[second] for w in reference]),
    ):
        difference = paired(ours, theirs, images)
        out[name] = {"value": round(difference.value, 4), "ci95": difference.ci95}
    return out


def show(line: dict) -> None:
    by = "  ".join(f"{name} {part['pointing']:.3f}" for name, part in line["by"].items())
    low, high = line["pointing_ci95"]
    under, over = line["miou_ci95"]
    print(
        f"{line['setting']:<58} nfe {line['nfe']:<3} pointing {line['pointing']:.3f} [{low:.3f}, {high:.3f}]  "
        f"mIoU {line['miou']:.3f} [{under:.3f}, {over:.3f}] @{line['threshold']:g}  {by}  {line['seconds']:.0f} s",
        flush=True,
    )


class Sweep:
    """Tries settings on one split and remembers what each gave."""

    def __init__(self, base: TeacherConfig, examples: Sequence[Example], done: Callable[[list[dict]], object]):
        self.base, self.examples, self.done = base, examples, done
        self.tried: dict[str, dict] = {}
        self.options: dict[str, dict] = {}

    def score(self, options: dict) -> float:
        """Mean of pointing game and mIoU."""
        name = described(options)
        if name not in self.tried:
            began = time.monotonic()
            cfg = replace(self.base, **options)
            found = words(cfg, self.examples)
            threshold = best_threshold([word.found for word in found])
            self.tried[name] = row(name, cfg, found, threshold, time.monotonic() - began)
            self.options[name] = options
            show(self.tried[name])
            self.done(list(self.tried.values()))
        line = self.tried[name]
        return (line["pointing"] + line["miou"]) / 2

    def climb(self, start: dict, axes: Iterable[Callable[[dict], Sequence[dict]]]) -> dict:
        """The best setting found by trying every value of one axis after the other.

        Args:
            axes: each gives the changes to try for the best setting so far.
        """
        best = start
        top = self.score(best)
        for axis in axes:
            base = best
            for change in axis(base):
                candidate = {**base, **change}
                try:
                    value = self.score(candidate)
                except UserError as error:
                    print(f"{described(candidate)}: left out ({error})", flush=True)
                    continue
                if value > top + 1e-9:
                    top, best = value, candidate
        return best

    def fast(self) -> str:
        """Name of the best setting that takes one forward."""
        return max((name for name, line in self.tried.items() if line["nfe"] == 1), key=self._value)

    def _value(self, name: str) -> float:
        return self.tried[name]["pointing"] + self.tried[name]["miou"]


def described(options: dict) -> str:
    """The settings that differ from the plain ones, in words."""
    parts = [f"t={','.join(map(str, options['timesteps']))}"]
    meant = {"none": (), "ddim": ("inversion_steps",), "null-text": ("inversion_steps", "inner_steps")}
    silent = {"timesteps", "inversion_steps", "inner_steps"} - set(meant[options["inversion"]])
    for name, value in options.items():
        if name not in silent and value != PLAIN.get(name):
            parts.append(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(parts)


def axes(
    names: Sequence[tuple[str, int]], timesteps: list[int], most: int, inversions: Sequence[dict]
) -> list[Callable[[dict], list[dict]]]:
    """What is tried.

    Args:
        names: (name, side) of the model's layers.
        most: most forwards of several timesteps or draws.
        inversions: settings of inversions, tried at the best timestep.
    """
    sides = sorted({side for _, side in names})
    pairs = [[a, b] for i, a in enumerate(sides) for b in sides[i + 1 :]]
    grids = [{"resolutions": [side], "resolution_weights": []} for side in sides]
    grids += [{"resolutions": pair, "resolution_weights": []} for pair in pairs]
    if len(sides) > 1:
        rest = round((1 - STRESS) / (len(sides) - 1), 3)
        grids += [
            {"resolutions": sides, "resolution_weights": [STRESS if side == one else rest for side in sides]}
            for one in sides
        ]
    refined = [
        {"refine": power, "refine_resolution": side}
        for power in (1, 2)
        for side in sides
        if side <= MAP_SIDE or not pairs
    ]

    def several(best: dict) -> list[dict]:
        chosen = [timesteps[i : i + n] for n in (2, 3) if n <= most for i in range(len(timesteps) - n + 1)]
        return [{"timesteps": some} for some in chosen if best["timesteps"][0] in some]

    return [
        lambda best: [{"phrases": level} for level in ("phrase", "clause", "mean", "product")],
        lambda best: [{"timesteps": [t]} for t in timesteps],
        lambda best: grids,
        lambda best: [{"layers": layers} for layers in parts_of(names)],
        lambda best: [{"renormalise": True}],
        lambda best: refined,
        several,
        lambda best: [{"draws": n} for n in (2, 4, 8) if n * len(best["timesteps"]) <= most],
        lambda best: [{"draws": 1, **inversion} for inversion in inversions],
    ]


def parts_of(names: Sequence[tuple[str, int]]) -> list[str]:
    """Expressions for parts of the model: a UNet's way down, middle and way up, or each block of a transformer."""
    kinds = list(dict.fromkeys(name.split(".")[0] for name, _ in names))
    if "up_blocks" in kinds:
        return ["^down_blocks", "^mid_block", "^up_blocks", "^(mid_block|up_blocks)", "^(down_blocks|up_blocks)"]
    return [f"^{re.escape(name)}$" for name, _ in names]


def read_inversion(text: str) -> dict:
    """`ddim:50`, or `null-text:50:10` with the inner steps behind the steps."""
    kind, _, rest = text.partition(":")
    numbers = [int(part) for part in rest.split(":") if part.isdigit()]
    if kind not in ("ddim", "null-text") or not numbers:
        raise UserError(f"--inversions: cannot read '{text}': write ddim:50 or null-text:50:10")
    found = {"inversion": kind, "inversion_steps": numbers[0]}
    return found | ({"inner_steps": numbers[1]} if len(numbers) > 1 else {})


def table(rows: Sequence[dict]) -> str:
    """The rows as a table of Markdown, in the order they were tried; the best of each column in bold."""
    roles = any("role" in line for line in rows)
    differs = any("over_plain" in line for line in rows)
    heads = [*(["chosen as"] if roles else []), "setting", "NFE", "pointing game", "mIoU"]
    heads += ["pointing over the plain mean", "mIoU over the plain mean"] if differs else []
    lines = [heads, ["---"] * len(heads)]
    top = {name: max(line[name] for line in rows) for name in ("pointing", "miou")}
    for line in rows:
        cells = [*([line["role"]] if roles else []), f"`{line['setting']}`", str(line["nfe"])]
        for name in ("pointing", "miou"):
            value = f"{line[name]:.3f}"
            low, high = line[f"{name}_ci95"]
            cells.append(f"{f'**{value}**' if line[name] == top[name] else value} [{low:.3f}, {high:.3f}]")
        for name in ("pointing", "miou") if differs else ():
            found = line.get("over_plain", {}).get(name)
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(found["value"], *found["ci95"]) if found else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def document(found: dict, name: str) -> str:
    """What `--document` writes: both tables, and what they were measured on.

    Args:
        found: the content of a file that `--json` wrote.
        name: that file, as it is called in the text.
    """
    parts = []
    for part, title in (("test", "Reported"), ("val", "Tried, in this order")):
        rows = found[part]
        if rows:
            one = rows[0]
            parts.append(
                f"{title} on {one['images']} images of `{found['result']['data']}/{part}`, {one['n']} words with a "
                f"region; a random point would score {one['chance']:.3f}, the middle of the image {one['centre']:.3f}."
            )
            parts.append(table(rows))
    parts.append(f"From `{name}`; teacher `{found['result']['teacher']}`; 95% intervals over images.")
    return "\n\n".join(parts)


def write_document(path: Path, text: str) -> None:
    """Puts a text between the marks of a file.

    Raises:
        UserError: the file has no such marks.
    """
    if not path.is_file() or not re.search(f"{BEGIN}.*{END}", (old := path.read_text(encoding="utf-8")), re.DOTALL):
        raise UserError(f"--document {path}: there is no such file with the marks {BEGIN} and {END}")
    head, _, rest = old.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def split(cfg: Config, name: str, limit: int) -> list[Example]:
    folder = Layout(cfg).examples_dir(name)
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds no examples: run `make shard DATA={cfg.data.name}` first")
    found = list(labelled(Archive(folder), limit))
    if not found:
        raise UserError(f"no example of {folder} has regions: choose data with meta.regions")
    return found


def layers_of(cfg: TeacherConfig) -> list[tuple[str, int]]:
    """(name, side) of the model's attention layers."""
    adapter = load_adapter(replace(cfg, **PLAIN, timesteps=[100]), "cpu")
    return [(layer.name, layer.side) for layer in adapter.layers]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val", default="val", help="split on which settings are chosen")
    parser.add_argument("--test", default="test", help="split on which they are reported")
    parser.add_argument(
        "--limit", type=int, default=250, help="examples per split on which settings are chosen; 0: all"
    )
    parser.add_argument("--test-limit", type=int, default=500, help="examples on which they are reported; 0: all")
    parser.add_argument("--timesteps", default="20,50,100,200,300,400", help="timesteps to try")
    parser.add_argument("--most", type=int, default=4, help="most forwards per window of several timesteps or draws")
    parser.add_argument(
        "--inversions", nargs="*", default=["ddim:10", "ddim:50"], help="ddim:STEPS or null-text:STEPS:INNER"
    )
    parser.add_argument(
        "--only", choices=("val", "configured"), help="the sweep alone, or the configured settings alone"
    )
    parser.add_argument("--json", type=Path, help="write all rows here, after each of them")
    parser.add_argument("--document", type=Path, help="only write the tables of --json into this file of Markdown")
    args, overrides = parser.parse_known_args(argv)
    if args.document:
        if not args.json or not args.json.is_file():
            raise UserError("--document takes the tables from --json: give the file of an earlier run")
        write_document(args.document, document(json.loads(args.json.read_text()), args.json.as_posix()))
        print(f"{args.document}: written from {args.json}")
        return 0
    cfg = compose(overrides)
    torch.set_num_threads(cfg.teacher.threads)
    timesteps = [int(t) for t in args.timesteps.split(",")]
    rows: dict[str, list[dict]] = {"val": [], "test": []}

    def result() -> dict:
        last = (rows["test"] or rows["val"])[-1]
        kept = {k: v for k, v in last.items() if k not in ("by", "options", "over_plain")}
        return {"teacher": cfg.teacher.name, "data": cfg.data.name, **kept}

    def keep(tried: list[dict]) -> None:
        rows["val"] = tried
        if args.json:
            args.json.write_text(json.dumps({"result": result(), **rows}, indent=1) + "\n")

    configured = {name: getattr(cfg.teacher, name) for name in SWEPT}
    plain = {**configured, **PLAIN, "timesteps": list(cfg.teacher.timesteps)[:1] or [100]}
    inversions = [read_inversion(text) for text in args.inversions]
    sweep = Sweep(cfg.teacher, split(cfg, args.val, args.limit), keep)
    print(f"{cfg.teacher.name} on {cfg.data.name}/{args.val}", flush=True)
    sweep.score(plain)
    sweep.score(configured)
    chosen = {described(plain): "plain mean over all layers"}
    roles = [(described(configured), "as configured")]
    if args.only != "configured":
        best = described(sweep.climb(plain, axes(layers_of(cfg.teacher), timesteps, args.most, inversions)))
        roles += [(sweep.fast(), "fast"), (best, "best")]
    for name, role in roles:
        chosen[name] = f"{chosen[name]}, {role}" if name in chosen else role
    if args.only != "val":
        examples = split(cfg, args.test, args.test_limit)
        print(f"{cfg.teacher.name} on {cfg.data.name}/{args.test}", flush=True)
        reference: list[Word] = []
        for name, role in chosen.items():
            began = time.monotonic()
            own = replace(cfg.teacher, **sweep.options[name])
            threshold = sweep.tried[name]["threshold"]
            found = words(own, examples)
            line = {"role": role, **row(name, own, found, threshold, time.monotonic() - began)}
            if reference:
                line["over_plain"] = over(found, threshold, reference, sweep.tried[described(plain)]["threshold"])
            reference = reference or found
            rows["test"].append(line)
            show(line)
            keep(rows["val"])
    print(f"RESULT {json.dumps(result())}")
    return 0


if __name__ == "__main__":
    from stages.cli import guarded

    sys.exit(guarded(main))
