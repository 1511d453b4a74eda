"""Finding and fetching: content manifests, blocks and the fetch planner. No I/O, no clock."""
