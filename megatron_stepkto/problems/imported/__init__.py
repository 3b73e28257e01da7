"""Solutions judged elsewhere: public step-label formats, converted to our records."""
