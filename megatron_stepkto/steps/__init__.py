"""Steps of a solution: as spans of text, and as spans of tokens."""
