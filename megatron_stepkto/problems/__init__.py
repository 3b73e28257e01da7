"""Where problems come from, and what must not overlap."""
