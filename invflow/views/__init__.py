"""Figures and exports: functions of samples and tensors."""
