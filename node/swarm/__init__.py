"""What this node does in a swarm."""
