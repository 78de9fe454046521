"""Samplers and signals for trainers of other libraries; one flat file per host."""
