"""Guards of the core."""
