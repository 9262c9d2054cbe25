# Hosts for the examples, made on one machine; read by their scripts with `.`.
#
# A host is a network namespace with a bridge `br0` on a common switch, plus
# directories of its own. Real hosts need none of this: there the defaults of
# `dunlin` and `dunlin-shim` do, and no flag is given twice.

[ "$(id -u)" = 0 ] || { echo "hosts can be made by root only" >&2; exit 1; }

# Programs that were built last, unless the caller says which.
target=${CARGO_TARGET_DIR:-$(dirname "$0")/../../target}
bin=${DUNLIN_BIN:-$(dirname "$(ls -t "$target"/{release,debug}/dunlin-shim 2>/dev/null | head -n 1)")}
[ -x "$bin/dunlin" ] || { echo "build first: cargo build --release" >&2; exit 1; }

run=$(mktemp -d /run/dunlin-example-XXXXXX)   # state of all hosts
name=${run##*/}                               # a name nobody else has
hosts=()

# make_host NAME ADDRESS: a host on the switch.
make_host() {
    local host=$1 address=$2
    hosts+=("$host")
    mkdir "$run/$host"
    ip netns add "$name-$host"
    ip -n "$name-switch" link add name "$host" type veth peer name up0 netns "$name-$host"
    ip -n "$name-switch" link set dev "$host" master switch up
    ip -n "$name-$host" link add br0 type bridge
    ip -n "$name-$host" link set up0 master br0 up
    ip -n "$name-$host" address add "$address/24" dev br0
    ip -n "$name-$host" link set br0 up
    ip -n "$name-$host" link set lo up
}

# on HOST COMMAND...: runs a command in the host's network.
on() {
    nsenter --net="/run/netns/$name-$1" "${@:2}"
}

# dunlin HOST ARGUMENTS...: the OCI runtime and the user's commands.
dunlin() {
    DUNLIN_SHIM=$run/$1/shim.sock on "$1" "$bin/dunlin" --root "$run/$1/containers" "${@:2}"
}

# rest HOST METHOD PATH [JSON]: one call of the REST API, on the local socket.
rest() {
    curl --silent --show-error --fail-with-body --unix-socket "$run/$1/shim.sock" \
        --request "$2" --header 'Content-Type: application/json' ${4:+--data "$4"} \
        "http://localhost$3"
}

# start_shim HOST ADDRESS: the node's daemon.
start_shim() {
    nsenter --net="/run/netns/$name-$1" "$bin/dunlin-shim" --node "$1" \
        --runtime "$bin/dunlin" --runtime-root "$run/$1/containers" \
        --socket "$run/$1/shim.sock" --state-dir "$run/$1/state" \
        --bundles "$run/$1" --insecure-listen "$2:7070" 2>"$run/$1/shim.log" &
    for _ in {1..500}; do
        rest "$1" GET /v1/node >/dev/null 2>&1 && return
        kill -0 $! || break
        sleep 0.01
    done
    cat "$run/$1/shim.log" >&2
    return 1
}

# make_bundle HOST ID PROGRAM...: a container of busybox that runs PROGRAM.
make_bundle() {
    local bundle=$run/$1/$2 host=$1 id=$2 args='' word
    shift 2
    mkdir -p "$bundle"/rootfs/{bin,dev,proc,sys,tmp}
    cp /bin/busybox "$bundle/rootfs/bin/"
    ln "$bundle/rootfs/bin/busybox" "$bundle/rootfs/bin/sh"
    for word; do args+="${args:+, }\"$word\""; done
    cat >"$bundle/config.json" <<JSON
{
  "ociVersion": "1.0.2",
  "root": { "path": "rootfs" },
  "hostname": "$id",
  "process": {
    "cwd": "/", "args": [ $args ], "env": [ "PATH=/bin" ],
    "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": true
  },
  "mounts": [
    { "destination": "/proc", "type": "proc", "source": "proc" },
    { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }
  ],
  "linux": {
    "cgroupsPath": "/$name/$host/$id",
    "namespaces": [
      { "type": "pid" }, { "type": "mount" }, { "type": "network" },
      { "type": "uts" }, { "type": "ipc" }
    ]
  }
}
JSON
}

# Whatever happens, nothing is left behind.
clean_up() {
    trap '' INT TERM
    set +e
    local host id top
    [ -z "$(jobs -p)" ] || kill $(jobs -p)   # the shims
    wait
    for host in "${hosts[@]}"; do
        for id in $(ls "$run/$host/containers" 2>/dev/null); do
            dunlin "$host" delete --force "$id"
        done
        ip netns delete "$name-$host"
    done
    ip netns delete "$name-switch"
    for top in /sys/fs/cgroup /sys/fs/cgroup/*; do
        [ -d "$top/$name" ] && find "$top/$name" -depth -type d -exec rmdir {} +
    done
    rm -rf "$run"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$name-switch"
ip -n "$name-switch" link add switch type bridge
ip -n "$name-switch" link set switch up
