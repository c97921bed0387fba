"""Everything on a device that is not the CPU."""
