"""Classical restoration methods and the best linear estimate."""
