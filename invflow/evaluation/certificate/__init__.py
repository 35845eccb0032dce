"""The certificate of a calibration: test quantities, verdict, and figure."""
