"""HTTP and WebSocket routes: parse, call, send; no logic."""
