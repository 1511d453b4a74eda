"""What peers do together: tasks, algorithms, models, exchange and the worker process that learns."""
