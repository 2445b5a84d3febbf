"""After a scheduled run: tell someone how it went."""
