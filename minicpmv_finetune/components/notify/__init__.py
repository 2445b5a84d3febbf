"""After a scheduled run: post the outcome to a webhook."""
