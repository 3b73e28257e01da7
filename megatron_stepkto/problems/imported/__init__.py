"""Solutions judged elsewhere: public step-label formats become our records."""
