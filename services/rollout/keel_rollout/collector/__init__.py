"""The collector: follows run records, has prompts sampled and judged, fills the streams."""
