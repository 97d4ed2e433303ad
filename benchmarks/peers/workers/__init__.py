"""What runs inside a peer's own Python: standard library and the peer's own only; see `protocol`."""
