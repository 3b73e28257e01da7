"""A recipe: its keys, the file that holds them, and the prompt that they describe."""
