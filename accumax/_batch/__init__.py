"""Which rows go together, and what a loss returns."""
