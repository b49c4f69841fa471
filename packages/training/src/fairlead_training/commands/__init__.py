"""Commands of the training package."""
