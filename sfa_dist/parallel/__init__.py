"""Ranks: how a process becomes one, how ranks find each other, stay alive and stop. No model and no data here.

    launch      which rank this is, by launcher          rendezvous, joining  how ranks find each other
    runtime     rank, device and collectives             environment          the only reader of os.environ
    devices     which device and which cores are a rank's own
    stop_flag   stop requests                            process_exit, process_state
    engines/    what shards and steps the model          watch/               who is alive
    energy      what the ranks' GPUs take

Others import `runtime`, `launch`, `energy`, `stop_flag`, `process_exit`, `environment` and the sub-packages.
Start with `runtime`.
"""
