"""What every other package may use: files, locks, processes, records, stages."""
