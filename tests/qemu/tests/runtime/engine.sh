# The engine: walls, life, devices, and the labels of AppArmor, which is on in this kernel.
. /oci/steps.sh

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


modprobe virtio_blk
disk() { tries=0; while [ ! -b /dev/vda ] && [ $tries -lt 1000 ]; do tries=$((tries + 1)); usleep 20000; done; cat /sys/block/vda/dev; }
disk=$(disk)
# The cost model gives a disk a weight of its own only where it is on.
echo "$disk enable=1" > /sys/fs/cgroup/io.cost.qos
bundle disks
sed -i "s/12345/${disk%:*}/g; s/54321/${disk#*:}/g" /oci/bundle/config.json
step limits_of_disks_and_pages 0 code oci create disks
step io_max "$disk rbps=1048576 wbps=max riops=max wiops=100" group disks io.max
step io_weight "default 4950
$disk 10000" group disks io.weight
step huge_pages 4194304 group disks hugetlb.2MB.max
oci update --blkio-weight 1000 disks
first_weight() { group disks $1 | head -n 1; }
step update_weight "default 10000" first_weight io.weight
step delete_disks 0 code oci delete --force disks

# The other scheduler that knows weights, on a scale of its own.
echo "$disk enable=0" > /sys/fs/cgroup/io.cost.qos
insmod /oci/bfq.ko
echo bfq > /sys/block/vda/queue/scheduler
scheduler() { sed -n 's/.*\[\(.*\)\].*/\1/p' /sys/block/vda/queue/scheduler; }
step bfq_is_on bfq scheduler
step create_under_bfq 0 code oci create disks
step bfq_weight "default 500
$disk 1000" group disks io.bfq.weight
oci update --blkio-weight 300 disks
step update_bfq_weight "default 300" first_weight io.bfq.weight
step delete_under_bfq 0 code oci delete --force disks
step no_such_rdma_device 1 told no_rdma 'linux.resources.rdma: this host has no device `rxe0`'
step no_such_pages 1 told no_pages 'no hugetlb.3MB.max .*CONFIG_CGROUP_HUGETLB'
step no_such_disk 1 told no_disk 'linux.resources.blockIO: this host has no device `99:99`'

mount -t securityfs none /sys/kernel/security
dd if=/oci/profile of=/sys/kernel/security/apparmor/.replace bs=1M 2> /dev/null
loaded() { grep -c "^edged-test (enforce)" /sys/kernel/security/apparmor/profiles; }
step profile_is_loaded 1 loaded
bundle profile
step profile "edged-test (enforce)
refused
1000" oci run profile
bundle confined
oci create --bundle /oci/bundle confined > /dev/null 2>&1
oci start confined
step confined running wait_for confined running
step exec_is_confined "edged-test (enforce)
refused" in_use confined '/bin/busybox cat /proc/self/attr/apparmor/current; /bin/busybox cat /forbidden 2> /dev/null || echo refused'
exec_as() { oci exec --apparmor "$1" confined /bin/busybox true 2>&1 | grep -c "$2"; }
step exec_in_no_profile 1 exec_as no-such-profile 'security label (no-such-profile): .*no such profile is loaded'
step delete_confined 0 code oci delete --force confined
step no_such_profile 1 told no_profile 'security label (no-such-profile): .*no such profile is loaded'
step selinux_is_off 1 told labelled 'process.selinuxLabel: no SELinux in this kernel.*CONFIG_SECURITY_SELINUX'

echo "all steps are done"
poweroff -f
