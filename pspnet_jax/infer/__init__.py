"""Inference on whole images: prediction, evaluation and pictures."""
