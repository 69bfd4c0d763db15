"""The embedded queue: the queues of one directory, in SQLite files, on trio."""
