"""Input data: the format of samples, reading of images and data files, importers, and the checks of each sample."""
