"""What LFR costs, and what it is worth: timings, and the comparison at equal cost."""
