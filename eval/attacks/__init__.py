"""Attempts to bring erased concepts back."""
