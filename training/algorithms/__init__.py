"""How it is learned: one short file per algorithm, found through the ``shoal.algorithms`` entry points."""
