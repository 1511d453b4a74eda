"""The wire: ids, errors, codec, frames, RPC core, tensors, signatures. No I/O, no clock, no global random."""
