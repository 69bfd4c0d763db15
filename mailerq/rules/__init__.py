"""Facts and the time in, a decision out: pure functions without I/O."""
