"""What XLA must be told."""
