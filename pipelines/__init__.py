"""How the steps are chained, and the command line."""
