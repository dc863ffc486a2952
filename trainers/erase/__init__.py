"""Erasing by gradient steps."""
