"""What comes in: samples, image files, the readers and importers of data files, and the checks of a sample."""
