"""Request body -> draft of a job; log -> events; job -> body. Pure functions for every route, stream and poll."""
