"""The process: composition root, libp2p host, RPC shell, storage, swarms, workers and the local API."""
