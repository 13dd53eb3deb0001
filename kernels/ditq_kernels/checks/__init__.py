"""What an op accepts, checked once at the public edge, in one sentence each."""
