"""Experience that crosses the wire: shards of it, their store, who draws from it, who checks it, and who acts.

Nothing in here needs torch: an actor's process loads NumPy alone.
"""
