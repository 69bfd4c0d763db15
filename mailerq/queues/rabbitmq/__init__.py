"""RabbitMQ as a backend of the queues."""
