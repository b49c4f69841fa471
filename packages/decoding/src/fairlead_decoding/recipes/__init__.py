"""Recipes: each reproduces a paper's effect at small scale, with thresholds and a report."""
