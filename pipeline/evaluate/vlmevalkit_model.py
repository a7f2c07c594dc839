"""Our arms as models of VLMEvalKit: copy this file into its folder `vlmeval/vlm/` as `lavender.py`.

Add the line `from .lavender import Lavender` to `vlmeval/vlm/__init__.py`, install this package beside VLMEvalKit, and
list the arms in a settings file of VLMEvalKit's, `python run.py --config arms.json --work-dir OUTPUTS`:

    {"model": {"base": {"class": "Lavender", "model": "llama32-11b", "outputs": "OUTPUTS/base"},
               "lavender-1": {"class": "Lavender", "model": "llama32-11b", "outputs": "OUTPUTS/lavender-1",
                              "weights": "runs/llama32-11b/llava_json/lavender-1"}},
     "data": {"AI2D_TEST": {"class": "ImageMCQDataset", "dataset": "AI2D_TEST"}}}

VLMEvalKit's own classes choose prompt and sampling by the model's path, so a tuned copy is asked otherwise than its
base. Here every arm gets the benchmark's own prompt and greedy decoding; both are recorded in `decoding.json` beside
its outputs, without which `make eval SUITE=vlmevalkit` compares nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmeval.vlm.base import BaseModel

MAX_NEW_TOKENS = 512


class Lavender(BaseModel):
    """The base, or a trained arm of ours.

    Args:
        model: a name in `conf/model`.
        weights: a run, a model or an adapter of that model; empty for the base.
        outputs: the folder that VLMEvalKit writes this arm's outputs to.
        max_new_tokens: longest answer, the same for every arm.
        device: where it runs; empty takes a GPU if there is one.
        options: further settings of ours, as in `["model.dtype=bfloat16"]`.

    Raises:
        UserError: no such model or weights.
    """

    INTERLEAVE = False

    def __init__(
        self,
        model: str,
        weights: str = "",
        outputs: str = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
        device: str = "",
        options: Sequence[str] = (),
    ):
        import torch

        from pipeline.config import compose
        from pipeline.evaluate import arms
        from pipeline.evaluate.answers import own_decoding

        cfg = compose([f"model={model}", *options])
        run = arms.Run("given", None, Path(weights).expanduser() if weights else None, Path())
        self._student = arms.load(cfg, run, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokens = max_new_tokens
        if outputs:
            record(Path(outputs).expanduser(), max_new_tokens, cfg.model.dtype, own_decoding(self._student))

    def use_custom_prompt(self, dataset: str) -> bool:
        """Never: every arm gets the prompt of the benchmark."""
        return False

    def generate_inner(self, message: Sequence[Mapping], dataset: str | None = None) -> str:
        """The greedy answer to a message of texts and images, of which the first image is shown.

        Args:
            message: parts `{"type": "text" or "image", "value": text or path}`.
        """
        from pipeline.evaluate.answers import generate
        from pipeline.evaluate.questions import Question
        from pipeline.examples import Example, Turn

        text = "\n".join(part["value"] for part in message if part["type"] == "text").replace("<image>", "").strip()
        images = [Path(part["value"]) for part in message if part["type"] == "image"]
        data = images[0].read_bytes() if images else None
        ext = images[0].suffix.lower().lstrip(".") if images else ""
        turns = (Turn("user", text), Turn("assistant", "."))
        example = Example("vlmevalkit", data, ext, turns, "vlmevalkit", "vlmevalkit", "", {})
        question = Question("vlmevalkit", "vlmevalkit", 0, "vlmevalkit", 1, "", text, "", "")
        ((raw, _, problem),) = generate(self._student, {"vlmevalkit": [example]}, [question], self._tokens)
        if problem:
            print(f"no answer: {problem}")  # VLMEvalKit keeps the empty answer, which counts as wrong
        return raw


def record(folder: Path, max_new_tokens: int, dtype: str, own: Mapping) -> Path:
    """Writes how answers are made to `decoding.json` in an arm's folder; returns its path.

    Args:
        own: what the arm's own directory decides, see `answers.own_decoding`.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        harness = version("vlmeval")
    except PackageNotFoundError:
        harness = "unknown"
    told = {
        "decoding": "greedy",
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "prompt": "the benchmark's own",
        "vlmevalkit": harness,
        **own,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "decoding.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path
