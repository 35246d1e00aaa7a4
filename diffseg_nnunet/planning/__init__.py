"""Peak memory, hardware, and which axes may be mirrored."""
