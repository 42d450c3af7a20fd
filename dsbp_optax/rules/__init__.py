"""What is done with a matrix: the metric, the projection, moments, the sharpness."""
