"""A first recipe for a model and its problems: what can be measured or looked up is, and the rest is named."""
