"""Every op in plain torch: specification, default implementation and oracle."""
