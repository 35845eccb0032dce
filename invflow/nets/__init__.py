"""Networks for flow maps and adapters."""
