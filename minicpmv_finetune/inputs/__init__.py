"""The inputs of a run: their table, and the checks of a whole run before its first step."""
