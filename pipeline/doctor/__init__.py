"""Preflight of a training run: what it reads, what it needs and what stands in its way, before anything is trained."""
