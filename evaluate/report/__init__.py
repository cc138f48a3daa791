"""What a reader sees of an evaluation: tables, plots, the page."""
