"""Fine-tuning: the transfer from another model, and the parameters that are trained."""
