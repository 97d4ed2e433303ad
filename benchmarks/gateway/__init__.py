"""What the gateway adds: load against a fake upstream in another process, direct and through it."""
