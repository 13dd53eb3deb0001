"""What all reports share: one template, one set of colours, one sentence on where they come from. No network."""
