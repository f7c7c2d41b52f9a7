"""How far synthetic patches lie from real ones, beside how far real patients lie from each other."""
