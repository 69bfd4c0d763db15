"""A reserve on the own disk for mail that a broker cannot take now."""
