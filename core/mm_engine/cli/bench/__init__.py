"""`engine bench`: latency, throughput, a load against a server, and the time that a start takes."""
