"""Sources of problems, and the check that training and evaluation problems do not overlap."""
