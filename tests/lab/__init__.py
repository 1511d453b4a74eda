"""The NAT lab: hosts behind every kind of NAT, made of network namespaces; `make lab` runs every pair of them."""
