"""HTTP in, tokens out: the processes that face clients. No torch here."""
