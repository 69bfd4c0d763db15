"""Incoming mail: listeners, sessions, and the reception of each mail."""
