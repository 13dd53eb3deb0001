"""What a call of an op costs the host, in small linears; without a GPU behind a driver that does nothing."""
