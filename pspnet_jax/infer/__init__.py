"""Whole images through the network: prediction, scoring and pictures."""
