"""A stage over several layers: one after another, or each in a process of its own."""
