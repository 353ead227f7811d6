"""A window of calls: its state, its boundary and its checks."""
