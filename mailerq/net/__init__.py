"""Sockets, TLS, DNS, tasks and deadlines: where the protocol machines meet trio."""
