"""Tiny students with random weights: the real classes, tokenizers and chat templates of their kind, made in place.

What `model.weights=random model.size=tiny` runs, and what the tests of the families run.
"""

from pathlib import Path

from pipeline.student.config import ModelConfig
from pipeline.student.tiny.minicpm import build_minicpm
from pipeline.student.tiny.mllama import build_mllama
from pipeline.student.tiny.native import BUILDERS, TEXTS, build
from pipeline.student.tiny.openflamingo import FLAMINGOS, build_openflamingo

KINDS = ("mllama", "minicpmv", *BUILDERS, *FLAMINGOS)


def build_student(kind: str, directory: Path) -> ModelConfig:
    """Writes a tiny student into a directory and returns the settings that load it.

    Args:
        kind: one of `KINDS`: a `model_type`, or the name of an OpenFlamingo.
    """
    if kind in FLAMINGOS:
        return ModelConfig(name=kind, **build_openflamingo(kind, directory))
    if kind == "mllama":
        build_mllama(directory, TEXTS, max_num_tiles=4, image_size=32, vocabulary=400)
    elif kind == "minicpmv":
        build_minicpm(directory)
    else:
        build(kind, directory)
    return ModelConfig(name=kind, path=str(directory))
