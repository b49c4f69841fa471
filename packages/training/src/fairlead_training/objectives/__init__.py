"""Objectives by family; each class reads SequenceStats and states its equation. Importing this imports none of them."""
