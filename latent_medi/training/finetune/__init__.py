"""Starting from another model: what is taken over, and what is trained."""
