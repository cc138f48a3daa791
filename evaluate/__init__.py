"""Measures a transcoder on held-out rows of a store, and writes metrics.json, plots and report.html."""
