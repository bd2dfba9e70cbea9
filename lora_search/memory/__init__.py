"""Predicted bytes."""
