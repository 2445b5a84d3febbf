"""Trying a model: from Python, over HTTP, and on a page."""
