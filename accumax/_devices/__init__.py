"""How rows, parameters and sums are divided over devices."""
