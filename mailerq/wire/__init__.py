"""SMTP as pure state machines between bytes and events, without I/O and clock."""
