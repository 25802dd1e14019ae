"""Tasks through device, uplink, server and downlink."""
