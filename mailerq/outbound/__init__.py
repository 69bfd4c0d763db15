"""Mail that goes out: dispatcher, flows, and the sessions with other hosts."""
