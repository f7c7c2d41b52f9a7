"""Planning: which combinations to generate, and how many images of each, as a table that a person can edit."""
