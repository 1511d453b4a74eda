"""The local API: what this node and its mesh are doing, for the same user on the same machine."""
