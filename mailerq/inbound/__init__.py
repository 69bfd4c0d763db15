"""Mail that comes in: listeners, sessions, and the reception of each mail."""
