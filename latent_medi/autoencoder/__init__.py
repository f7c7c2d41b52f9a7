"""Training of an autoencoder, from an existing one or from random weights."""
