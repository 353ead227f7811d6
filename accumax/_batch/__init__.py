"""Microbatches of a call: the rows, the losses, the aux and the gradients."""
