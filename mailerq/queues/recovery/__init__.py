"""Recovery of the contents of a damaged queue file."""
