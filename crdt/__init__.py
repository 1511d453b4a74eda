"""Shared state nobody can forge: signed op logs, documents, views, sync, presence. No I/O, no clock."""
