"""The engine core: requests, blocks, scheduler and loop. Python and numpy only; tensors live behind `device.Device`."""
