"""The diffusion side: from an image and a text to one attention map per word."""
