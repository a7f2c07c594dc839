"""Builders of the world's student; they lie with the other tiny students."""

from pipeline.student.tiny.mllama import IMAGE, SPECIAL, TEMPLATE, build_mllama, build_tokenizer

__all__ = ["IMAGE", "SPECIAL", "TEMPLATE", "build_mllama", "build_tokenizer"]
