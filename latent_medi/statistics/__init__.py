"""Statistics that know no patch: intervals over patients, distances, neighbours, linear probes, subsamples."""
