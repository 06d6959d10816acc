"""Model execution: architectures as data, lazy weights and the one decoder block that runs them all."""
