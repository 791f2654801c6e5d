"""Who is alive: a hub on rank 0's node, a process beside each rank, and the verdict on who is lost.

    guard          the rank's side            hub      the listening side
    watch_process  a process beside a rank    verdict  the rule that names the lost rank
    lines          the messages between them

Start with `guard`.
"""
