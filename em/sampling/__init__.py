"""Responses from a model, token by token."""
