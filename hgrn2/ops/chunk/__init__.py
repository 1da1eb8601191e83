"""The scan in chunks on tensor cores, for head dims 16 to 256: `op` registers it, `directions` and the hosts cut it up
and plan the launches, `common` holds the mathematics, the rest is kernels."""
