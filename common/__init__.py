"""What gateway and worker must agree on: jobs, wire formats, Redis protocol, options and text handling."""
