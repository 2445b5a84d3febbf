"""Step 6: register a model that passed the gate, and make it champion."""
