"""What runs the fleet: command line, launcher, images, benchmarks and the demo model."""
