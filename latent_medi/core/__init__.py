"""What every room stands on: errors, files, settings, locks, devices. It knows no patch and no model."""
