"""Images, named in a table or found in a folder, and other containers of patches into a dataset folder."""
