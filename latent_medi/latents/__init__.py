"""The frozen autoencoder, latent folders with the posterior moments of a dataset, and random access to them."""
