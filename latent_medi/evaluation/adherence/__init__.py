"""Whether samples show the requested class, site and other attributes, and the site's stain."""
