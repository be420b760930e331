"""The gateway: jobs by REST, engine registry, leases and queue; and the `keel` command.

The truth about every run is its record in Redis (`keel.record`): nothing that must survive a
restart is kept in the gateway's memory. Only one gateway runs at a time on a Redis; two would lease
the same engine to different runs.
"""
