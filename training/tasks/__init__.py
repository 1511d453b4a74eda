"""What is learned: environments with rewards, found by name through the ``shoal.tasks`` entry points."""
