"""Recipes: the papers' effects at small scale."""
