"""Shoal: train one reinforcement-learning policy together, with no server."""

__version__ = "0.1.0"
