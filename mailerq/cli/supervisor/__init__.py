"""Several processes: the parent that starts and watches them, and what each child does."""
