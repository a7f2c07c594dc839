"""Answers, pointing and intervals: the same questions to every arm."""
