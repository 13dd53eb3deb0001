"""What kernels are made of, per architecture, compiled without a GPU: census, issue model, gate."""
