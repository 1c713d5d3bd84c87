# What every engine here has. `step NAME EXPECTED COMMAND...` runs a command and tells whether its output is what was expected.
export PATH=/oci/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t cgroup2 none /sys/fs/cgroup
exec > /dev/console 2>&1
cd /oci/bundle

oci() { /usr/bin/edged oci --root /run/oci "$@" < /dev/null; }
step() {
    name=$1 expected=$2
    shift 2
    found=$("$@" 2>&1)
    if [ "$found" = "$expected" ]; then echo "ok $name"; else echo "not ok $name: $found (not: $expected)"; fi
}
bundle() { cp /oci/configs/$1.json /oci/bundle/config.json; }
code() { "$@" > /dev/null 2>&1; echo $?; }
status() { oci state "$1" | sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p'; }
wait_for() { tries=0; while [ "$(status "$1")" != "$2" ] && [ $tries -lt 1000 ]; do tries=$((tries + 1)); usleep 20000; done; status "$1"; }
group() { cat /sys/fs/cgroup/edged-oci/$1/$2; }
in_use() { oci exec "$1" /bin/busybox sh -c "$2"; }

told() { bundle "$1"; oci run "$1" 2>&1 | grep -c "$2"; }
