"""Pure functions from facts and the time to a decision, without I/O."""
