"""The last step of a run: say how it ended, also to a webhook."""
