"""Connections: libp2p, the port, paths, names of peers to addresses."""
