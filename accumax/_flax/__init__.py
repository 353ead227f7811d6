"""Losses with a state, for Flax."""
