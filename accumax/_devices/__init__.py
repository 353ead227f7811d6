"""Which device has what."""
