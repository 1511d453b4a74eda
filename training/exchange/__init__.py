"""How peers agree on a round and merge what they learned."""
