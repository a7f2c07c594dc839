"""The tiny students that the tests of all families run on."""

from pathlib import Path

from pipeline.student import tiny
from pipeline.student.tiny.native import build
from pipeline.student.tiny.openflamingo import FLAMINGOS, published_openflamingo

NATIVE = (
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "gemma3",
    "idefics2",
    "idefics2_split",
    "paligemma",
    "minicpmv4_6",
)
KINDS = ("mllama", "minicpm-llama3-v25", *NATIVE, *FLAMINGOS)

__all__ = ["FLAMINGOS", "KINDS", "NATIVE", "build", "build_student", "published_openflamingo"]


def build_student(kind: str, directory: Path):
    """The settings that load a tiny model of this kind."""
    return tiny.build_student("minicpmv" if kind == "minicpm-llama3-v25" else kind, directory)
