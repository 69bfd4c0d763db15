"""Bytes on the wire against events: SMTP as pure state, with no I/O and no clock."""
