"""Redis in, tensors through, tokens out: the processes that hold a model."""
