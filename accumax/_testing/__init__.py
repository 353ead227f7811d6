"""How far an update is from the big batch's, and in which way."""
