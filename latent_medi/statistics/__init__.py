"""Statistics that know no patch: bootstrap over patients, distances, neighbours, linear probes, subsamples."""
