"""``explore``: a page in the browser of this machine to browse patches and draw samples."""
