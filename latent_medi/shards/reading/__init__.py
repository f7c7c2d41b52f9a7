"""Reading at scale: folders behind a URL, batches for many processes, patches read ahead by threads."""
