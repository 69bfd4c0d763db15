"""Several processes: the parent starts and watches them; each child runs an engine."""
