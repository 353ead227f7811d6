"""Code that depends on how XLA and JAX compile."""
