"""Layouts before they run: which are possible, what they hold in memory, how long they take."""
