"""What each operator means, in plain differentiable torch: any device, any dtype, float64 too."""
