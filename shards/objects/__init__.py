"""Stores in an object store."""
