"""What the engine keeps beside the queues: the operator's rows."""
