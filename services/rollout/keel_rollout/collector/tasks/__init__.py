"""The built-in tasks, and what judges their responses."""
