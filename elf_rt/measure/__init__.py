"""How fast, how faithful, how good: bench, verify, eval."""
