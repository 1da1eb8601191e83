"""The scan token by token with states in registers, for head dims 1 to 8: `op` registers it, `host` cuts it up."""
