"""Spherical family: losses that need the logits only through their sum, their sum of squares and the target's."""
