"""Recipes of fairlead-watermark: each reproduces a paper's effect at small scale and writes a report."""
