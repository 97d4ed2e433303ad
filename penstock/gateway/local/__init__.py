"""Engines on this machine, as processes: started, watched, restarted, put to sleep, ended with `penstock up`.

    Fleet ─▶ Supervisor of a replica ─▶ keeper (a process) ─▶ engine's server ─▶ whatever it starts
               │ restart: when again          └─ ends all of them when `up` is gone, however it went
               └─ command: how an engine is started
    control: one replica started again with other flags, for `penstock tune`
    shared: the same fleet, asked by several processes of the gateway

It knows processes, ports and URLs. What an engine is, and how much memory it takes, it is told.
"""
