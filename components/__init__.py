"""The five steps that run in containers, and what they share, one module a subject."""
