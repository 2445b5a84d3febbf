"""Before a scheduled run trains: decide whether the data is new, and where training starts."""
