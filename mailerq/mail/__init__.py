"""Pure functions from bytes to bytes: header fields, x-mq-* fields, messages of a received mail."""
