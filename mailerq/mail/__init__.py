"""Mail as bytes in, bytes out: header fields, x-mq-* extraction."""
