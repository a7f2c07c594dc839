"""Overlays, plots and the page that shows a comparison."""
