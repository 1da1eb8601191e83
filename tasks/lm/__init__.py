"""Causal language modelling: tokens, a causal backbone, next-token prediction."""
