"""Finished students, `bundled:NAME`: a folder each, as `save` writes it, with its card, evaluation and recipe."""
