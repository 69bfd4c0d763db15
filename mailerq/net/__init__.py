"""Sockets, TLS, DNS, workers and logs: the parts that connect the protocol machines to trio."""
