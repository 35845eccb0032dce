"""What a linear operator's matrix is, and what follows from it in closed form."""
