"""Classical restorations and the best linear estimate."""
