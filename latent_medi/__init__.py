"""latent-medi: metadata-guided latent diffusion for histopathology."""

__version__ = "0.1.0"
