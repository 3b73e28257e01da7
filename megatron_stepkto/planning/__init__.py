"""Planning of layouts: which are possible, their memory and their times."""
