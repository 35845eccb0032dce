"""Networks that flow maps and adapters are made of."""
