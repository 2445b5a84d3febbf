"""The HTML pages that steps write: the shared design, curves, and the training record behind them."""
