"""Peak memory, hardware, which axes may be mirrored, and why a plan is as it is."""
