"""Coverage-guided fuzzing of everything that reads bytes from strangers; `run.py` is the way in."""
