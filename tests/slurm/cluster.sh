#!/usr/bin/env bash
# A real Slurm on one Linux machine, for tests: each node has its own host name, network address, process ids, /dev/shm
# and local disk; the rest of the file system is shared, as a cluster's home is. Needs root and Debian's packages
# slurmctld slurmd slurm-client munge iproute2 openssh-server pdsh (other distributions: the same programs).
#
#     cluster.sh start 4 [bound]    nodes node1..node4, ready when it returns; a start that fails leaves only its logs
#     cluster.sh hold 4 [bound]     the same in the foreground, until its standard input ends: dies with who started it
#     cluster.sh run sbatch JOB     a command on the login host, in this folder and environment
#     cluster.sh on node2 CMD       a command on a node, past Slurm
#     cluster.sh kill node2         its power goes
#     cluster.sh boot node2         it comes back
#     cluster.sh status | stop
#     cluster.sh install            fetches what is missing by apt-get, then as check
#     cluster.sh check              says whether a cluster can run here
#
# --state DIR before the command (default: $SFA_TEST_CLUSTER or /tmp/sfa-cluster) tells clusters apart; any number run
# at once.
# Each node offers 96 cores, 1 TB and 8 GPUs that are /dev/null by other names, so that real scripts are scheduled as
# they are. Nothing is limited: there are no cgroups. Partitions: main, and urgent, which preempts it. With `bound` a
# node offers the cores that this machine has, and tasks are bound to them.
#
# login host            a set of namespaces with a bridge, munged and slurmctld. Its first process is the cluster:
#   node1 .. nodeN      when that dies, the kernel kills all others and takes networks and mounts down with them.
#                       A node is a nested set of namespaces with one network cable (veth) to the bridge, and slurmd.
set -euo pipefail

HERE=$(readlink -f "$0")
STATE=${SFA_TEST_CLUSTER:-/tmp/sfa-cluster}
NETWORK=10.77.0
LOGIN_ADDRESS=$NETWORK.254
GPUS=8
READY_SECONDS=60 # on a machine that is busy; two seconds on one that is not
# To the current folder by `env`, as it is mounted there: rename(2) from that of outside would cross to another mount.
INSIDE=(--mount --uts --ipc --net --pid --)
PROGRAMS=(slurmctld slurmd sbatch munged ip unshare nsenter sshd pdsh)
PACKAGES=(slurmctld slurmd slurm-client munge iproute2 openssh-server pdsh)
# /usr/sbin is not on everybody's PATH.
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "cluster.sh: $1" >&2
    exit 1
}

wait_until() { # wait_until WHAT COMMAND... : polls
    local what=$1 end=$((SECONDS + READY_SECONDS))
    shift
    until "$@"; do
        ((SECONDS < end)) || fail "$what did not come in $READY_SECONDS s; see $STATE/log"
        sleep 0.05
    done
}

# ---------------------------------------------------------------------------------------------------- outside

login_pid() { # of the cluster's first process, as seen from here; fails when it does not run
    local pid
    [[ -f $STATE/login.pid ]] || return 1
    pid=$(<"$STATE/login.pid")
    # The number may be somebody else's by now.
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "--state $STATE login" || return 1
    echo "$pid"
}

on_login() {
    local pid
    pid=$(login_pid) || fail "no cluster runs in $STATE"
    nsenter --target "$pid" "${INSIDE[@]}" env --chdir="$PWD" "$@"
}

on_node() {
    local node=$1 pid
    shift
    [[ -f $STATE/node/$node ]] || fail "no node $node"
    pid=$(<"$STATE/node/$node")
    on_login nsenter --target "$pid" "${INSIDE[@]}" env --chdir="$PWD" "$@"
}

missing_programs() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

check_machine() {
    local missing why
    [[ $(id -u) == 0 ]] || fail "needs root: namespaces, mounts and device files"
    missing=$(missing_programs)
    [[ -z $missing ]] || fail "missing: ${missing//$'\n'/ } (apt-get install ${PACKAGES[*]})"
    [[ -d /etc/slurm ]] || fail "no folder /etc/slurm to mount the configuration on"
    why=$(unshare --mount --uts --ipc --net --pid --fork sh -c 'mount -t proc proc /proc && hostname test &&
        mount -t tmpfs tmpfs /dev/shm && mknod /dev/shm/gpu c 1 3 && ip link add bridge type bridge &&
        ip link add node type veth peer name eth0' 2>&1) || fail "this machine gives no nodes of their own: $why"
}

install() {
    [[ $(id -u) == 0 ]] || fail "needs root"
    if [[ -n $(missing_programs) ]]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null
    fi
    check_machine
}

start() { # start NODES [bound]: leaves descriptor 9 open, on which the cluster hangs until `keep` is written to it
    local nodes=$1 kind=$2 node
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "start needs a number of nodes, 1 to 99"
    [[ -z $kind || $kind == bound ]] || fail "start knows \`bound\` behind the number of nodes, and not $kind"
    # Slurm's sockets lie in it, and the longest path of one is 107: DIR/spool/node99/node99_1234567.4294967295.
    ((${#STATE} <= 64)) || fail "$STATE is too long a path for sockets: at most 64 characters"
    check_machine
    ! login_pid >/dev/null || fail "a cluster runs in $STATE already; stop it first"
    clear_state
    mkdir -p "$STATE"/{etc,gpu,munge,log,ctld,spool,node,local,tmp}
    for ((node = 1; node <= nodes; node++)); do
        mkdir "$STATE/spool/node$node"
    done
    write_configuration "$nodes" "$kind"
    # Its standard input is this pipe: should this process die, it ends, and everything with it.
    exec 9> >(exec setsid unshare --mount --uts --ipc --net --pid --fork --kill-child \
        bash "$HERE" --state "$STATE" login "$nodes" &>"$STATE/log/login")
    wait_until "the login host" login_pid >/dev/null
    wait_until "Slurm with $nodes idle nodes" idle_nodes "$nodes"
}

idle_nodes() { # idle_nodes NODES: whether that many are there
    login_pid >/dev/null || fail "the cluster ended while it started; see $STATE/log/login"
    [[ $(on_login sinfo --noheader --Node --partition=main --states=idle --format=%T 2>/dev/null | grep -cx idle) == "$1" ]]
}

is_up() { # is_up NODE
    [[ -f $STATE/node/$1 ]] || return 1
    [[ $(on_login sinfo --noheader --nodes="$1" --partition=main --format=%T 2>/dev/null) =~ ^(idle|mixed|allocated)$ ]]
}

stop() {
    local pid
    if pid=$(login_pid); then
        kill -KILL "$pid"
        while [[ -d /proc/$pid ]]; do sleep 0.02; done
    fi
    clear_state
}

clear_state() { # removes only what this script has made
    [[ ! -e $STATE || -f $STATE/etc/slurm.conf || -z $(ls -A "$STATE") ]] || fail "$STATE is not a cluster's folder"
    rm -rf "$STATE"
}

write_configuration() {
    local nodes=$1 kind=$2 gpu node hardware="Sockets=1 CoresPerSocket=96" plugin=none
    if [[ $kind == bound ]]; then
        hardware=$(slurmd -C | sed -n 's/.*\(SocketsPerBoard=.* ThreadsPerCore=[0-9]*\).*/\1/p')
        plugin=affinity
    fi
    dd if=/dev/urandom of="$STATE/munge/key" bs=128 count=1 status=none
    chmod 600 "$STATE/munge/key"
    for ((gpu = 0; gpu < GPUS; gpu++)); do
        mknod "$STATE/gpu/gpu$gpu" c 1 3
    done
    {
        echo "127.0.0.1 localhost"
        echo "$LOGIN_ADDRESS login"
        for ((node = 1; node <= nodes; node++)); do
            echo "$NETWORK.$node node$node"
        done
    } >"$STATE/etc/hosts"
    echo "Name=gpu File=$STATE/gpu/gpu[0-$((GPUS - 1))]" >"$STATE/etc/gres.conf"
    # A step takes up to 3 s to go. A controller that has not waited for that (MessageTimeout) sends its order to end the
    # step again a minute later; a requeued job that did not wait for its two minutes has that step again by then.
    cat >"$STATE/etc/slurm.conf" <<END
ClusterName=test
SlurmctldHost=login($LOGIN_ADDRESS)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/socket
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/ctld/pid
SlurmdPidFile=$STATE/spool/%n.pid
SlurmctldLogFile=$STATE/log/slurmctld
SlurmdLogFile=$STATE/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/$plugin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout=8
MessageTimeout=10
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobs
NodeName=node[1-$nodes] NodeAddr=$NETWORK.[1-$nodes] $hardware RealMemory=1000000 Gres=gpu:$GPUS
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
END
}

# ----------------------------------------------------------------------------------------- first processes, inside

login() { # login NODES: the first process of the login host
    local nodes=$1 own_pid node word=""
    read -r own_pid _ </proc/self/stat # /proc is still the machine's: the number by which it is known there
    hostname login
    mount -t proc proc /proc
    mount --bind "$STATE/etc" /etc/slurm
    mount --bind "$STATE/etc/hosts" /etc/hosts
    # By this file the nodes find the network into which to plug their cable.
    touch "$STATE/login.net"
    mount --bind /proc/self/ns/net "$STATE/login.net"
    ip link set lo up
    ip link add bridge type bridge
    ip address add "$LOGIN_ADDRESS/24" dev bridge
    ip link set bridge up
    munged --force --key-file="$STATE/munge/key" --socket="$STATE/munge/socket" --pid-file="$STATE/munge/pid" \
        --seed-file="$STATE/munge/seed" --log-file="$STATE/log/munged"
    slurmctld
    for ((node = 1; node <= nodes; node++)); do
        boot "node$node"
    done
    echo "$own_pid" >"$STATE/login.pid.new"
    mv "$STATE/login.pid.new" "$STATE/login.pid"
    read -r word || true
    [[ $word == keep ]] || exit 1
    while true; do sleep infinity & wait; done # reaps what loses its parents
}

boot() { # boot NODE, on the login host
    local node=$1
    # The kernel takes the cable of a dead node away a moment after the node.
    ip link delete "$node" 2>/dev/null || true
    setsid unshare --mount --uts --ipc --net --pid --fork --kill-child \
        bash "$HERE" --state "$STATE" node "$node" </dev/null >>"$STATE/log/$node" 2>&1 9>&- &
}

node() { # node NODE: the first process of a node
    local node=$1 own_pid
    read -r own_pid _ </proc/self/stat # by which the login host knows it
    hostname "$node"
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs -o size=256m tmpfs "$STATE/local"
    # Always the same hardware address: the others remember it when the node comes back.
    nsenter --net="$STATE/login.net" ip link add "$node" type veth \
        peer name eth0 netns 1 address "$(printf '02:00:00:00:00:%02x' "${node#node}")"
    nsenter --net="$STATE/login.net" ip link set "$node" master bridge up
    ip link set lo up
    ip address add "$NETWORK.${node#node}/24" dev eth0
    ip link set eth0 up
    slurmd -N "$node"
    echo "$own_pid" >"$STATE/node/$node"
    while true; do sleep infinity & wait; done
}

# ------------------------------------------------------------------------------------------------------ commands

if [[ ${1:-} == --state ]]; then
    STATE=$(readlink -m "${2:?--state needs a folder}")
    shift 2
fi
command=${1:-help}
shift || true
case $command in
    start)
        start "${1:-}" "${2:-}"
        echo keep >&9
        ;;
    hold)
        start "${1:-}" "${2:-}"
        trap stop EXIT
        echo "ready"
        cat >/dev/null 9>&- # only this process may keep the cluster alive
        ;;
    stop) stop ;;
    install) install ;;
    check) check_machine ;;
    status)
        login_pid >/dev/null || fail "no cluster runs in $STATE"
        on_login sinfo --Node --partition=main --format="%N %T %C %G"
        ;;
    run) on_login "$@" ;;
    on) on_node "$@" ;;
    kill)
        on_login kill -KILL "$(<"$STATE/node/${1:?which node?}")"
        rm "$STATE/node/$1"
        ;;
    boot)
        on_login bash "$HERE" --state "$STATE" boot_inside "${1:?which node?}"
        wait_until "$1" is_up "$1"
        ;;
    login) login "$@" ;;
    node) node "$@" ;;
    boot_inside) boot "$@" ;;
    *)
        sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$HERE"
        [[ $command == help || $command == --help ]] || exit 64
        ;;
esac
