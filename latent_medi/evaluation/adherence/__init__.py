"""Whether samples show what was asked for: class, site and other attributes, and stain."""
