"""One token: the recurrence's step, matrix-vector products around it, and CUDA graphs of whole steps."""
