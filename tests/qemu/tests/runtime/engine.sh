# The engine. `step NAME EXPECTED COMMAND...` runs a command and tells whether its output is what was expected.
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

bundle exits
step exit_code 7 code oci run exits
step nothing_is_left 1 code oci state exits

bundle walls
step walls "33554432
8
50000 100000" oci run walls

bundle sleeps
create() { oci create --bundle /oci/bundle sleeps > /dev/null 2>&1; status sleeps; }
step create created create
oci start sleeps
step start running wait_for sleeps running
step memory_limit 33554432 group sleeps memory.max
step swap_limit 0 group sleeps memory.swap.max
step exec 1 in_use sleeps 'cat /sys/fs/cgroup/cgroup.procs 2> /dev/null | head -n 1; true'

oci pause sleeps
step paused paused wait_for sleeps paused
step frozen 1 group sleeps cgroup.freeze
oci resume sleeps
step resumed running wait_for sleeps running

oci update --memory 16777216 --pids-limit 5 --cpu-quota 20000 --cpu-period 100000 sleeps
step update_memory 16777216 group sleeps memory.max
step update_pids 5 group sleeps pids.max
step update_cpu "20000 100000" group sleeps cpu.max

open_kmsg() { in_use sleeps '/bin/busybox mknod /kmsg c 1 11; /bin/busybox head -c 1 /kmsg' 2>&1 | grep -c "Operation not permitted"; }
step a_device_that_is_not_listed_does_not_open 1 open_kmsg
open_zero() { in_use sleeps '/bin/busybox mknod /zero c 1 5; /bin/busybox head -c 1 /zero | /bin/busybox wc -c'; }
step a_listed_device_opens 1 open_zero

step delete_of_a_running_one_fails 1 code oci delete sleeps
oci kill sleeps KILL
step killed stopped wait_for sleeps stopped
step delete 0 code oci delete sleeps
gone() { ls /sys/fs/cgroup/edged-oci | grep -c sleeps; }
step no_group_is_left 0 gone

bundle hog
step memory_wall 137 code oci run hog
bundle forks
oci create --bundle /oci/bundle forks > /dev/null 2>&1
oci start forks
full() { tries=0; while [ "$(group forks pids.peak)" != 8 ] && [ $tries -lt 1000 ]; do tries=$((tries + 1)); usleep 20000; done; group forks pids.peak; }
step pids_wall 8 full
refused() { group forks pids.events | sed -n 's/max \([1-9][0-9]*\)/more/p'; }
step forks_are_refused more refused
step force_delete 0 code oci delete --force forks

echo "all steps are done"
poweroff -f
