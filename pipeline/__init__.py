"""Lavender Pipeline: diffusion instruction tuning of vision-language models."""
