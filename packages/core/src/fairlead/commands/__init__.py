"""Commands that work on any registered method: generate and detect."""
