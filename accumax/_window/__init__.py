"""Which call closes a window."""
