"""Structure of a linear operator's matrix, and closed forms that follow from it."""
