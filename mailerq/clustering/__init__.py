"""An instance of a cluster: announcements, addresses that one instance owns, shared rows."""
