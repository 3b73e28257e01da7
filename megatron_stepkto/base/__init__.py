"""Shared by every other package: files, locks, processes, records, stages."""
