"""Solvers: each turns a reward into weighted samples of p(x) e^{r(x)}."""
