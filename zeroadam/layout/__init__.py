"""Which rank owns what, and where it lies in memory. No communication."""
