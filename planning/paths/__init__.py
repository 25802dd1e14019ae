"""Which path to take through a local network and a host: candidates, times, throughput, rewards and the search."""
