"""The frozen autoencoder, the encoding of a dataset into posterior moments, and the random-access store of them."""
