"""Hydra configuration groups, packaged so that an installed wheel composes the same settings as a clone."""
