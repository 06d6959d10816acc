"""Weights in few bits: what formats mean, how they are read or made, and products that keep them small in memory."""
