"""Which backend and which launch configuration an op uses here."""
