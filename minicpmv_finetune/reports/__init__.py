"""The HTML reports of the steps: their common design, curves, and the training record that they show."""
