"""The embedded world: synthetic scenes with known masks, and the tiny models trained on them."""
