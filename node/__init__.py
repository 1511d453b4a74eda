"""The process: composition root, libp2p host, RPC shell, storage, swarms, workers and the local API."""

from shoal.node.late import stand_in

stand_in()  # before anything here imports libp2p
