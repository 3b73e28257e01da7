"""A run: its folder and its stages in order."""
